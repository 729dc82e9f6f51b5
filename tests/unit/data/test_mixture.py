"""Proportions, determinism and resume of a mixture."""

import numpy as np
import pytest

from pmp_ds.data.loader import BlockLoader, order_key
from pmp_ds.data.mixture import PERIOD, Mixture, realised
from pmp_ds.errors import UserError

KEY = order_key("test", 7)


class Source:
    """Block i is [number, i, epochless]."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size

    def __len__(self) -> int:
        return self.size

    def gather(self, indices):
        return np.stack([np.full(len(indices), self.number), indices], axis=1).astype(np.uint16)


def mixture(*weights: float, sizes=(50, 300, 7)) -> Mixture:
    chosen = [Source(i, sizes[i]) for i in range(len(weights))]
    return Mixture([f"s{i}" for i in range(len(weights))], chosen, weights)


def stream(mix: Mixture, count: int, first: int = 0) -> np.ndarray:
    return mix.read(np.arange(first, first + count), KEY)


def test_proportions_are_the_weights():
    mix = mixture(0.5, 0.3, 0.2)
    found = np.bincount(stream(mix, PERIOD)[:, 0])
    assert found.tolist() == [32768, 19661, 13107]
    for count in (1, 1000, PERIOD, 3 * PERIOD + 17):
        expected = np.bincount(stream(mix, count)[:, 0], minlength=3)
        assert realised(mix.slots, count, KEY) == expected.tolist()
    early = np.bincount(stream(mix, 2000)[:, 0]) / 2000
    assert np.abs(early - [0.5, 0.3, 0.2]).max() < 0.05
    assert mixture(5, 3, 2).slots == mix.slots


def test_every_source_runs_through_its_epochs():
    found = stream(mixture(0.5, 0.3, 0.2), 6000)
    for number, size in enumerate((50, 300, 7)):
        blocks = found[found[:, 0] == number][:, 1]
        epochs = blocks[: len(blocks) // size * size].reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert len(epochs) > 1
        assert not np.array_equal(epochs[0], epochs[1])


def test_any_part_of_the_stream_is_the_stream():
    mix = mixture(1.0, 2.0)
    whole = stream(mix, PERIOD + 500)
    for first, count in ((0, 3), (777, 100), (PERIOD - 20, 40)):
        part = stream(mixture(1.0, 2.0), count, first)
        assert np.array_equal(part, whole[first : first + count])
    assert not np.array_equal(whole[:200], mix.read(np.arange(200), order_key("test", 8)))


def test_loader_resumes_at_another_world_size():
    """37 steps on one rank, then four ranks, then two: the uninterrupted samples."""
    mix, batch = mixture(0.5, 0.3, 0.2), 8
    expected = stream(mix, 60 * batch)
    found, consumed = [], 0
    for world_size, steps in ((1, 37), (4, 11), (2, 12)):
        loaders = [
            BlockLoader(mixture(0.5, 0.3, 0.2), KEY, batch, rank, world_size, consumed)
            for rank in range(world_size)
        ]
        for _ in range(steps):
            found += [loader.next().numpy() for loader in loaders]
        consumed = loaders[0].consumed_samples
        for loader in loaders:
            loader.close()
    assert np.array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, 0.0), "weight of s1 is 0.0"),
        ((1.0, -2.0), "must be positive"),
        ((1.0, float("nan")), "must be positive"),
        ((1.0, 1e-9), "below 1/65536"),
    ],
)
def test_unusable_weights(weights, message: str):
    with pytest.raises(UserError, match=message):
        mixture(*weights)
