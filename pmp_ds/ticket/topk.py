"""Select exactly the k largest magnitudes of a vector that is spread over the ranks.

Without its sign, a float's bit pattern orders like its magnitude, so counting replaces sorting. A
histogram of the high 15 bits, summed over ranks, finds the bin of the k-th largest element; for
fp32 a second one, of the low 16 bits inside that bin, finds its value. Among elements equal to it,
those with the lowest global index are taken until there are exactly k. This needs four passes over
the scores (finite?, two histograms, mask; one less for 16-bit scores), 256 KB + 512 KB of
communication, and temporary memory of one chunk. The result has the same bits for any number of
ranks and any sharding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from pmp_ds import dist
from pmp_ds.errors import UserError
from pmp_ds.ticket.mask import pack

CHUNK = 1 << 17  # elements, a multiple of 8; all temporaries have this size
T = TypeVar("T")
_NON_FINITE = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """Convert magnitudes to ordered int32: (n,) float to (n,) int32."""
    if scores.dtype == torch.float32:
        return scores.view(torch.int32) & 0x7FFFFFFF
    return scores.view(torch.int16).to(torch.int32) & 0x7FFF


def _chunk(device: torch.device) -> int:
    """Return the chunk size: larger on a GPU, where each chunk costs several launches."""
    return CHUNK if device.type == "cpu" else 32 * CHUNK


def _chunks(flat: torch.Tensor) -> list[torch.Tensor]:
    return list(flat.split(_chunk(flat.device))) if flat.numel() else []


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one CPU thread, because thousands of short loops lose more by waiting for a second thread
    than it saves: seconds instead of half a second (docs/PERFORMANCE.md)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def select_top_k(
    scores: Sequence[torch.Tensor],  # (n_i,) fp32, bf16 or fp16 each, contiguous; sign ignored
    starts: Sequence[int],  # global index of each fragment's first element
    names: Sequence[str],  # parameter of each fragment, for errors
    k: int,
    *,
    replicated: bool = False,
) -> list[torch.Tensor]:
    """Return packed masks (ticket/mask.py) of the k largest scores over all fragments of all ranks,
    (ceil(n_i / 8),) uint8 each.

    Ties go to the lowest global index. With ``replicated`` every rank has all fragments, and
    nothing is summed. Collective: every rank calls it, even without fragments. Raises UserError on
    every rank when a score is not finite, and names its parameter.
    """
    pool = _Pool(scores, starts, replicated)
    pool.check_finite(names)
    threshold, quotas = pool.threshold(k)
    return [_packed_mask(s, threshold, quota) for s, quota in zip(scores, quotas, strict=True)]


@dataclass
class _Pool:
    """The competing fragments, and the way ranks agree on them."""

    scores: Sequence[torch.Tensor]
    starts: Sequence[int]
    replicated: bool

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.replicated else dist.all_reduce_sum(tensor)

    def gather(self, value: T) -> list[T]:
        return [value] if self.replicated else dist.all_gather_object(value)

    @property
    def device(self) -> torch.device:
        return self.scores[0].device if self.scores else dist.device()

    def check_finite(self, names: Sequence[str]) -> None:
        """Raise the same UserError on every rank when any score is not finite."""
        bad = [n for n, s in zip(names, self.scores, strict=True) if not _is_finite(s)]
        for rank, found in enumerate(self.gather(bad[:1])):
            if found:
                raise UserError(
                    f"the gradient of {found[0]} is not finite (rank {rank}): discovery stops; "
                    "lower train.lr, lengthen train.warmup_steps or use a wider precision"
                )

    def threshold(self, wanted: int) -> tuple[int, list[int]]:
        """Return the smallest kept key, and how many of its equals each local fragment keeps."""
        if wanted == 0:
            return 0x7FFFFFFF, [0] * len(self.scores)  # above every finite key
        dtypes = {dtype for rank in self.gather({s.dtype for s in self.scores}) for dtype in rank}
        assert len(dtypes) == 1, f"scores of several dtypes: {dtypes}"
        shift = 16 if torch.float32 in dtypes else 0
        high = self.histogram(1 << 15, lambda keys: keys >> shift)
        assert wanted <= int(high.sum()), f"k={wanted} of {int(high.sum())} elements"
        key, above = _boundary(high, wanted)
        ties = int(high[key])
        if shift:
            top = key
            low = self.histogram(1 << 16, lambda keys: keys[keys >> 16 == top] & 0xFFFF)
            bottom, above_low = _boundary(low, wanted - above)
            key, above, ties = top << 16 | bottom, above + above_low, int(low[bottom])
        return key, self.tie_quotas(key, wanted - above, ties)

    def histogram(
        self, num_bins: int, to_bin: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return counts over all ranks, (num_bins,) int64."""
        counts = torch.zeros(num_bins, dtype=torch.int64, device=self.device)
        for score in self.scores:
            for chunk in _chunks(score):
                counts += torch.bincount(to_bin(_keys(chunk)), minlength=num_bins)
        return self.sum(counts)

    def tie_quotas(self, key: int, wanted: int, ties: int) -> list[int]:
        """Return how many elements equal to ``key`` each fragment keeps, lowest index first."""
        if wanted == ties:
            return [score.numel() for score in self.scores]
        local = [
            (start, sum(int((_keys(chunk) == key).sum()) for chunk in _chunks(score)))
            for start, score in zip(self.starts, self.scores, strict=True)
        ]
        quotas: dict[int, int] = {}
        for start, count in sorted(f for rank in self.gather(local) for f in rank if f[1]):
            quotas[start] = min(count, wanted)
            wanted -= quotas[start]
        return [quotas.get(start, 0) for start in self.starts]


def _boundary(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """Return the bin of the ``wanted``-th largest, and the number of elements in bins above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, wanted))
    above = int(from_top[position - 1]) if position else 0
    return counts.numel() - 1 - position, above


def _packed_mask(score: torch.Tensor, threshold: int, quota: int) -> torch.Tensor:
    """Return a mask of keys above ``threshold`` and the first ``quota`` of those equal to it."""
    bits = torch.empty((score.numel() + 7) // 8, dtype=torch.uint8, device=score.device)
    for chunk, out in zip(_chunks(score), bits.split(_chunk(bits.device) // 8), strict=False):
        keys = _keys(chunk)
        kept = keys > threshold
        if quota:
            equal = keys == threshold
            count = int(equal.sum())
            if count <= quota:
                kept.logical_or_(equal)
            else:
                kept[equal.nonzero().view(-1)[:quota]] = True
            quota -= min(count, quota)
        out.copy_(pack(kept))
    return bits


def _is_finite(score: torch.Tensor) -> bool:
    return all(int(_keys(c).max()) < _NON_FINITE[score.dtype] for c in _chunks(score))
