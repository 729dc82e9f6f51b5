"""The blocks of a split: rows of tokens, mapped from the shards of a store."""

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pmp_ds.data.readahead import will_need

Tokens = npt.NDArray[np.unsignedinteger]

COLD_SECONDS = 5e-6
"""Slower blocks came from a disk (10 to 100 microseconds) instead of memory (one)."""


class Blocks:
    """The blocks of one split, mapped from its shards without a copy."""

    def __init__(
        self,
        views: list[Tokens],  # each (rows, block_size)
    ) -> None:
        self.views = views
        """The blocks of every shard in order, each ``(rows, block_size)``, read-only."""
        self._ends = np.cumsum([len(view) for view in views])
        self._starts = self._ends - [len(view) for view in views]
        self.block_size: int = views[0].shape[1]
        self._cold = False

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(
        self,
        indices: npt.NDArray[np.integer],  # (n,)
    ) -> Tokens:
        """Copy these blocks, in this order, into one ``(n, block_size)`` array.

        Raises IndexError for an index outside ``[0, len(self))``.
        """
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"block index outside [0, {len(self)})")
        out = np.empty((len(indices), self.block_size), self.views[0].dtype)
        clock = time.perf_counter()
        wanted = list(self._by_shard(indices))
        if self._cold:
            for view, _, rows in wanted:
                will_need(view, rows)
        for view, here, rows in wanted:
            out[here] = view[rows]
        self._cold = time.perf_counter() - clock > COLD_SECONDS * len(indices)
        return out

    def _by_shard(
        self, indices: npt.NDArray[np.integer]
    ) -> Iterator[tuple[Tokens, npt.NDArray[np.integer], npt.NDArray[np.integer]]]:
        """Yield, for each shard involved, its blocks, their places in ``indices``, and its rows."""
        shards = np.searchsorted(self._ends, indices, side="right")
        shards = shards.astype(np.min_scalar_type(len(self.views)))  # numpy sorts small ones faster
        order = np.argsort(shards, kind="stable")
        cuts = np.searchsorted(shards, np.arange(len(self.views) + 1), sorter=order)
        for shard in np.flatnonzero(np.diff(cuts)):
            here = order[cuts[shard] : cuts[shard + 1]]
            yield self.views[shard], here, indices[here] - self._starts[shard]

    def gather_ref(self, indices: npt.NDArray[np.integer]) -> Tokens:
        """Do what ``gather`` does, block by block."""
        everything = [block for view in self.views for block in view]
        return np.stack([everything[i] for i in indices])
