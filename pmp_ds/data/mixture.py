"""Mix several sources of blocks in fixed proportions, in an order determined by the key.

The source of sample ``s`` repeats every 2^16 samples, in a keyed pattern with each source in
proportion to its weight. A source's own samples run through its shuffled epochs. So, as without a
mixture, a single integer is the whole state: the samples consumed.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pmp_ds.data.blocks import Blocks
from pmp_ds.data.loader import BlockSource, permute, shuffled
from pmp_ds.errors import UserError

PERIOD = 1 << 16

Numbers = npt.NDArray[np.int64]


class Mixture:
    """Gives a ``BlockLoader`` samples of several sources; weights are relative."""

    def __init__(
        self, names: Sequence[str], sources: Sequence[BlockSource], weights: Sequence[float]
    ) -> None:
        """Raise UserError for weights that are not positive or too small to occur."""
        assert len(names) == len(sources) == len(weights) > 0
        self._sources = tuple(sources)
        self.slots = slots_of(names, weights)
        """Number of samples of each source in every 2^16."""

    def __len__(self) -> int:
        """Return the blocks of all sources; an epoch of the mixture does not read each once."""
        return sum(map(len, self._sources))

    def read(
        self,
        samples: Numbers,  # (m,) global sample numbers
        key: bytes,
    ) -> npt.NDArray[np.unsignedinteger]:
        """Return the blocks of these samples, ``(m, block_size)``."""
        which, positions = self.locate(samples, key)
        return _assemble(
            which,
            lambda number, here: shuffled(
                self._sources[number], positions[here], _source_key(key, number)
            ),
        )

    def locate(self, samples: Numbers, key: bytes) -> tuple[Numbers, Numbers]:
        """Return each sample's source, and the number of earlier samples of that source."""
        pattern, ranks = _pattern(self.slots, key)
        cycles, slots = samples // PERIOD, samples % PERIOD
        which = pattern[slots]
        return which, cycles * np.array(self.slots)[which] + ranks[slots]


class InTurn:
    """A finite source with the blocks of several in their own order. Every prefix has the
    proportions of ``slots`` to within a block of each; the first source to end ends it."""

    def __init__(self, sources: Sequence[Blocks], slots: Sequence[int]) -> None:
        self._sources, self.block_size = tuple(sources), sources[0].block_size
        times = [(np.arange(len(s)) + 0.5) / q for s, q in zip(sources, slots, strict=True)]
        end = min(len(s) / q for s, q in zip(sources, slots, strict=True))
        times = [t[t < end] for t in times]
        order = np.argsort(np.concatenate(times), kind="stable")
        self._which = np.repeat(np.arange(len(times)), list(map(len, times)))[order]
        self._positions = np.concatenate([np.arange(len(t)) for t in times])[order]

    def __len__(self) -> int:
        return len(self._which)

    def gather(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[Any]:
        """Copy these blocks, in this order, into one ``(m, block_size)`` array."""
        positions = self._positions[indices]
        return _assemble(
            self._which[indices],
            lambda number, here: self._sources[number].gather(positions[here]),
        )


def slots_of(names: Sequence[str], weights: Sequence[float]) -> tuple[int, ...]:
    """Return the samples of each source in every 2^16: largest remainders, ties to the first."""
    for name, weight in zip(names, weights, strict=True):
        if not 0.0 < weight < float("inf"):
            raise UserError(f"the weight of {name} is {weight}; it must be positive")
    exact = np.array(weights, np.float64) / sum(weights) * PERIOD
    slots = np.floor(exact).astype(np.int64)
    missing = PERIOD - int(slots.sum())
    slots[np.argsort(-(exact - slots), kind="stable")[:missing]] += 1
    for name, weight, count in zip(names, weights, slots, strict=True):
        if count == 0:
            raise UserError(f"the weight of {name}, {weight}, is below 1/{PERIOD} of the mixture")
    return tuple(slots.tolist())


def realised(slots: Sequence[int], consumed_samples: int, key: bytes) -> list[int]:
    """Return how many of the first ``consumed_samples`` came from each source of a mixture."""
    cycles, rest = divmod(consumed_samples, PERIOD)
    part = np.bincount(_pattern(tuple(slots), key)[0][:rest], minlength=len(slots))
    return (cycles * np.array(slots) + part).tolist()


@lru_cache(maxsize=8)
def _pattern(slots: tuple[int, ...], key: bytes) -> tuple[Numbers, Numbers]:
    """Return every slot's source, ``(PERIOD,)``, and its rank among that source's slots."""
    order = permute(np.arange(PERIOD), PERIOD, _source_key(key, -1), 0)
    pattern = np.repeat(np.arange(len(slots)), slots)[order]
    ranks = np.empty(PERIOD, np.int64)
    for number, count in enumerate(slots):
        ranks[pattern == number] = np.arange(count)
    return pattern, ranks


def _assemble(
    which: Numbers,  # (m,) source of each row
    read: Callable[[int, npt.NDArray[np.bool_]], npt.NDArray[Any]],
) -> npt.NDArray[Any]:
    """Return the rows of ``read(source, where)``, each in its place, ``(m, block_size)``."""
    out: npt.NDArray[Any] | None = None
    for number in np.unique(which):
        here = which == number
        blocks = read(int(number), here)
        if out is None:
            out = np.empty((len(which), blocks.shape[1]), blocks.dtype)
        out[here] = blocks
    assert out is not None
    return out


def _source_key(key: bytes, number: int) -> bytes:
    return hashlib.sha256(b"pmp-ds mixture:%d:" % number + key).digest()
