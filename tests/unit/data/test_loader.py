"""The order is a permutation, the same for any number of ranks, and resumes from one integer."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmp_ds.data.loader import BlockLoader, order_key, permute
from tests.helpers.examples import examples

KEY = order_key("test", 0)


class Rows:
    """Block ``i`` is ``[i, i]``; counts reads, has a bad block, or is slow."""

    def __init__(self, n: int, bad_block: int | None = None, delay: float = 0.0) -> None:
        self.n, self.bad_block, self.delay, self.reads = n, bad_block, delay, 0

    def __len__(self) -> int:
        return self.n

    def gather(self, indices):
        self.reads += 1
        time.sleep(self.delay)
        if self.bad_block in indices:
            raise OSError("disk gone")
        return np.stack([indices, indices], axis=1).astype(np.uint16)


def stream(n: int, batch: int, steps: int, world: int = 1, start: int = 0) -> list[int]:
    """Return the global sample stream, assembled from all ranks."""
    out: list[int] = []
    loaders = [BlockLoader(Rows(n), KEY, batch, rank, world, start) for rank in range(world)]
    try:
        for _ in range(steps):
            for loader in loaders:
                out += loader.next()[:, 0].tolist()
    finally:
        for loader in loaders:
            loader.close()
    return out


def test_bijection_for_every_small_n():
    for n in range(1, 301):
        assert sorted(permute(np.arange(n), n, KEY, epoch=n % 3)) == list(range(n)), n


def test_bijection_around_powers_of_two():
    """Sizes where the number of bits changes, and where most results must be permuted again."""
    for n in [2**bits + off for bits in range(9, 17) for off in (-1, 0, 1)] + [100_000]:
        assert np.array_equal(np.sort(permute(np.arange(n), n, KEY, 1)), np.arange(n)), n


@examples(30)
@given(st.integers(1, 100_000), st.integers(0, 5), st.binary(min_size=32, max_size=32))
def test_bijection(n: int, epoch: int, key: bytes):
    out = permute(np.arange(n), n, key, epoch)
    assert np.array_equal(np.sort(out), np.arange(n))


def test_large_n_needs_no_memory_and_spreads():
    n = 10**10
    index = np.concatenate([np.arange(100_000), np.arange(n - 100_000, n)])
    out = permute(index, n, KEY, 0)
    assert len(np.unique(out)) == len(index)
    assert out.min() >= 0
    assert out.max() < n
    counts = np.histogram(out, bins=20, range=(0, n))[0]
    assert np.abs(counts - 10_000).max() < 500  # five standard deviations
    # Neighbours are unrelated: no more than chance stay close to each other.
    assert np.mean(np.abs(np.diff(out)) < n // 100) < 0.03


def test_positions_can_be_asked_in_any_order():
    whole = permute(np.arange(1000), 1000, KEY, 4)
    some = np.array([999, 0, 500, 500])
    assert permute(some, 1000, KEY, 4).tolist() == whole[some].tolist()


def test_keys_and_epochs_give_unrelated_orders():
    orders = [
        permute(np.arange(1000), 1000, key, epoch)
        for key, epoch in [
            (KEY, 0),
            (KEY, 1),
            (order_key("test", 1), 0),
            (order_key("other", 0), 0),
            (order_key("test", b"0"), 0),
        ]
    ]
    orders.append(np.arange(1000))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert np.mean(a == b) < 0.01  # one fixed point is expected


def test_order_is_pinned():
    """A changed order would silently change what a resumed run trains on."""
    assert order_key("train", 7).hex()[:16] == "92c32a5f369297f4"
    assert permute(np.arange(8), 1000, order_key("train", 7), 1).tolist() == [
        473,
        402,
        13,
        491,
        268,
        799,
        676,
        127,
    ]


def test_epochs_cover_every_block_and_roll_over_inside_a_batch():
    samples = stream(n=10, batch=4, steps=5)  # 20 samples: two epochs, batch 3 has both
    assert sorted(samples[:10]) == sorted(samples[10:]) == list(range(10))
    assert samples[:10] != samples[10:]


def test_batch_larger_than_the_data():
    samples = stream(n=3, batch=8, steps=3)
    assert [sorted(samples[i : i + 3]) for i in range(0, 24, 3)] == [[0, 1, 2]] * 8


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8])
def test_global_order_is_the_same_for_any_world_size(world: int):
    assert stream(n=21, batch=8, steps=7, world=world) == stream(n=21, batch=8, steps=7)


def test_first_ranks_take_what_does_not_divide():
    shares = []
    for rank in range(5):
        with BlockLoader(Rows(100), KEY, 8, rank, 5) as loader:
            shares.append(len(loader.next()))
            assert loader.consumed_samples == 8
    assert shares == [2, 2, 2, 1, 1]


def test_resume_at_another_world_size_mid_epoch():
    whole = stream(n=21, batch=8, steps=9)
    first = stream(n=21, batch=8, steps=4, world=2)
    rest = stream(n=21, batch=8, steps=5, world=4, start=len(first))
    assert first + rest == whole


def test_state_counts_returned_batches_not_those_read_ahead():
    with BlockLoader(Rows(100), KEY, 8, 0, 2, consumed_samples=16) as loader:
        assert loader.consumed_samples == 16
        batch = loader.next()
        time.sleep(0.05)  # the thread reads ahead meanwhile
        assert loader.consumed_samples == 24
    assert batch.dtype == torch.int64
    assert batch.shape == (4, 2)


def test_batches_are_not_page_locked_unless_asked():
    with BlockLoader(Rows(100), KEY, 8, 0, 1) as loader:
        assert not loader.next().is_pinned()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_page_locked_batches_hold_the_same_samples():
    """The pinned chunk is reused only after its copy: many batches, in flight together."""
    with BlockLoader(Rows(4096), KEY, 512, 0, 1, pin_memory=True) as loader:
        batches = [loader.next() for _ in range(24)]
        assert all(batch.is_pinned() for batch in batches)
        copies = [batch.to("cuda", non_blocking=True) for batch in batches]
        del batches
        copies += [loader.next().to("cuda", non_blocking=True) for _ in range(24)]
    torch.cuda.synchronize()
    found = torch.cat(copies)[:, 0].tolist()
    assert found == stream(4096, 512, 48)


def test_reading_ahead_is_bounded():
    rows = Rows(100)
    with BlockLoader(rows, KEY, 4, 0, 1):
        time.sleep(0.2)
        assert 2 <= rows.reads <= 3


def test_wait_seconds_measures_a_slow_source():
    with BlockLoader(Rows(100, delay=0.05), KEY, 4, 0, 1) as loader:
        for _ in range(4):
            loader.next()
        slow = loader.wait_seconds
    assert 0.1 < slow < 2.0
    with BlockLoader(Rows(100), KEY, 4, 0, 1) as loader:
        time.sleep(0.05)
        loader.next()
        assert loader.wait_seconds < 0.04


def test_errors_arrive_at_the_batch_they_belong_to():
    order = stream(100, 4, 25)
    loader = BlockLoader(Rows(100, bad_block=order[4 * 17 + 2]), KEY, 4, 0, 1)  # in batch 17
    for step in range(17):
        assert loader.next()[:, 0].tolist() == order[4 * step : 4 * step + 4]
    with pytest.raises(OSError, match="disk gone"):
        loader.next()
    with pytest.raises(RuntimeError, match="closed"):
        loader.next()


def test_close_ends_the_thread():
    before = threading.active_count()
    loader = BlockLoader(Rows(100), KEY, 4, 0, 1)
    loader.next()
    loader.close()
    loader.close()
    assert threading.active_count() == before
