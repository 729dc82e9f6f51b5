"""The packed masks of a rank's flats, from fragments that begin at any bit."""

from types import SimpleNamespace

import pytest
import torch

from pmp_ds.engine.memory import Meter
from pmp_ds.optim.stored import CHUNK
from pmp_ds.optim.zero import Fragment, flat_masks
from pmp_ds.ticket.mask import ParamMask, pack

LONG = 16 * CHUNK + 5


@pytest.fixture(scope="module")
def kept() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 13, "b": LONG + 6, "c": 3}
    return {name: torch.rand(n, generator=generator) < 0.7 for name, n in sizes.items()}


@pytest.fixture
def mask(kept: dict[str, torch.Tensor]) -> ParamMask:
    shapes = {name: tuple(one.shape) for name, one in kept.items()}
    return ParamMask({name: pack(one) for name, one in kept.items()}, shapes)


@pytest.fixture
def shards() -> SimpleNamespace:
    """One flat of a, all but 6 elements of b, and 4 of padding; one of c."""
    fragments = [
        Fragment("a", 0, 13, 0, 0),
        Fragment("b", 6, LONG, 0, 13),
        Fragment("c", 0, 3, 1, 0),
    ]
    flats = [torch.empty(13 + LONG + 4), torch.empty(3)]
    return SimpleNamespace(flats=flats, fragments=fragments)


def test_bits(shards, mask, kept):
    first, second = flat_masks(shards, mask).values()
    assert first is not None
    assert second is not None
    whole = torch.cat([kept["a"], kept["b"][6:], torch.zeros(4, dtype=torch.bool)])
    assert torch.equal(first, pack(whole))
    assert torch.equal(second, pack(kept["c"]))


def test_no_mask(shards):
    assert list(flat_masks(shards, None).values()) == [None, None]


def test_a_chunk_is_unpacked_at_a_time(shards, mask):
    with Meter(torch.device("cpu")) as meter:
        peak = meter.peak_of(lambda: flat_masks(shards, mask))
    assert peak < LONG, "less than the whole mask takes, one byte per element"
