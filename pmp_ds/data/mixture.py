"""Several sources of blocks in fixed proportions, in an order that is a function of the key.

The source of sample ``s`` repeats every 2^16 samples in a keyed pattern that holds each source in
proportion to its weight; a source's own samples run through its shuffled epochs. So one integer,
the samples consumed, is the whole state, as without a mixture.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pmp_ds.data.loader import BlockSource, permute, shuffled
from pmp_ds.errors import UserError

PERIOD = 1 << 16


class Mixture:
    """Gives a ``BlockLoader`` samples of several sources; weights are relative."""

    def __init__(
        self, names: Sequence[str], sources: Sequence[BlockSource], weights: Sequence[float]
    ) -> None:
        """Raises UserError for weights that are not positive or too small to occur."""
        assert len(names) == len(sources) == len(weights) > 0
        self.names, self._sources = tuple(names), tuple(sources)
        self._quotas = _quotas(names, weights)
        self._patterns: dict[bytes, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """Blocks in all sources together; an epoch of the mixture is not one of each."""
        return sum(map(len, self._sources))

    def read(
        self,
        samples: npt.NDArray[np.int64],  # (m,) global sample numbers
        key: bytes,
    ) -> npt.NDArray[np.unsignedinteger]:
        """The blocks of these samples, ``(m, block_size)``."""
        which, positions = self.locate(samples, key)
        out: npt.NDArray[np.unsignedinteger] | None = None
        for number, source in enumerate(self._sources):
            here = which == number
            if here.any():
                blocks = shuffled(source, positions[here], _source_key(key, number))
                if out is None:
                    out = np.empty((len(samples), blocks.shape[1]), blocks.dtype)
                out[here] = blocks
        assert out is not None
        return out

    def locate(
        self, samples: npt.NDArray[np.int64], key: bytes
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The source of every sample, and how many samples of that source come before it."""
        pattern, ranks = self._pattern(key)
        cycles, slots = samples // PERIOD, samples % PERIOD
        which = pattern[slots]
        return which, cycles * self._quotas[which] + ranks[slots]

    def realised(self, consumed_samples: int, key: bytes) -> dict[str, int]:
        """How many of the first ``consumed_samples`` came from each source, exactly."""
        cycles, rest = divmod(consumed_samples, PERIOD)
        part = np.bincount(self._pattern(key)[0][:rest], minlength=len(self.names))
        counts = cycles * self._quotas + part
        return dict(zip(self.names, counts.tolist(), strict=True))

    def _pattern(self, key: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The source of every slot ``(PERIOD,)``, and its rank among that source's slots."""
        if key not in self._patterns:
            order = permute(np.arange(PERIOD), PERIOD, _source_key(key, -1), 0)
            pattern = np.repeat(np.arange(len(self.names)), self._quotas)[order]
            ranks = np.empty(PERIOD, np.int64)
            for number in range(len(self.names)):
                here = pattern == number
                ranks[here] = np.arange(int(here.sum()))
            self._patterns[key] = pattern, ranks
        return self._patterns[key]


def _quotas(names: Sequence[str], weights: Sequence[float]) -> npt.NDArray[np.int64]:
    """Slots of each source in a period: largest remainders, ties to the first."""
    for name, weight in zip(names, weights, strict=True):
        if not 0.0 < weight < float("inf"):
            raise UserError(f"the weight of {name} is {weight}; it must be positive")
    exact = np.array(weights, np.float64) / sum(weights) * PERIOD
    quotas = np.floor(exact).astype(np.int64)
    missing = PERIOD - int(quotas.sum())
    quotas[np.argsort(-(exact - quotas), kind="stable")[:missing]] += 1
    for name, weight, quota in zip(names, weights, quotas, strict=True):
        if quota == 0:
            raise UserError(f"the weight of {name}, {weight}, is below 1/{PERIOD} of the mixture")
    return quotas


def _source_key(key: bytes, number: int) -> bytes:
    return hashlib.sha256(b"pmp-ds mixture:%d:" % number + key).digest()
