"""Select exactly the k largest magnitudes of a vector that is spread over the ranks.

Without its sign, a float's bit pattern orders like its magnitude, so counting replaces sorting. A
histogram of the high 15 bits, summed over ranks, finds the bin of the k-th largest element; for
fp32 a second one, of the low 16 bits inside that bin, finds its value. Among elements equal to it,
those with the lowest global index are taken until there are exactly k. This needs four passes over
the scores (two histograms, equals, mask; one less for 16-bit scores), 256 KB + 512 KB of
communication, and temporary memory of one chunk. The result has the same bits for any number of
ranks and any sharding. Nothing waits for the device but the test for scores that are not finite.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch

from pmp_ds import dist
from pmp_ds.errors import UserError
from pmp_ds.ticket.counting import counting_for, keys

T = TypeVar("T")
_NON_FINITE = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_HIGHEST = 0x7FFFFFFF  # above every finite key


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
    top = TopK(starts, names, replicated=replicated)
    masks, non_finite = top.select(scores, k)
    if int(non_finite):
        top.raise_non_finite(scores)
    return masks


class TopK:
    """Selection among the same fragments, again and again."""

    def __init__(
        self, starts: Sequence[int], names: Sequence[str], *, replicated: bool = False
    ) -> None:
        """Collective. Arguments as for ``select_top_k``."""
        self._names, self._replicated = names, replicated
        everywhere = sorted(start for rank in self._gather(list(starts)) for start in rank)
        places = {start: place for place, start in enumerate(everywhere)}
        self._num_fragments = len(everywhere)
        self._places = torch.tensor([places[start] for start in starts], dtype=torch.int64)
        self._dtype: torch.dtype | None = None
        self._numel, self._device = 0, dist.device()

    def select(
        self, scores: Sequence[torch.Tensor], k: int
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the masks, and how many scores of all ranks are not finite, () int64: if any, the
        masks mean nothing. Collective; does not wait for the device after the first call."""
        dtype = self._agreed(scores, k)
        device, counting = self._device, counting_for(self._device)
        self._places = self._places.to(device)
        shift = 16 if dtype == torch.float32 else 0
        high = self._sum(counting.histogram(scores, 1 << 15, shift, None).to(device))
        non_finite = high[_NON_FINITE[dtype] >> shift :].sum()
        if k == 0:
            key, wanted = torch.full_like(non_finite, _HIGHEST), torch.zeros_like(non_finite)
        else:
            key, wanted = _boundary(high, torch.full_like(non_finite, k))
            if shift:
                low = self._sum(counting.histogram(scores, 1 << 16, 0, key).to(device))
                bottom, wanted = _boundary(low, wanted)
                key = (key << 16) | bottom
        equals = counting.equals(scores, key)
        return counting.masks(scores, key, equals, self._quotas(equals, wanted)), non_finite

    def raise_non_finite(self, scores: Sequence[torch.Tensor]) -> None:
        """Raise the same UserError on every rank, which names the parameter of a score that is not
        finite. Collective."""
        bad = [
            name
            for name, score in zip(self._names, scores, strict=True)
            if score.numel() and int(keys(score).max()) >= _NON_FINITE[score.dtype]
        ]
        for rank, found in enumerate(self._gather(bad[:1])):
            if found:
                raise UserError(
                    f"the gradient of {found[0]} is not finite (rank {rank}): discovery stops; "
                    "lower train.lr, lengthen train.warmup_steps or use a wider precision"
                )

    def _quotas(self, equals: list[torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
        """Return how many elements equal to the key each fragment keeps, lowest index first."""
        counts = torch.zeros(self._num_fragments, dtype=torch.int64, device=wanted.device)
        if equals:
            local = torch.stack([found.sum() for found in equals])
            counts.index_add_(0, self._places, local)
        counts = self._sum(counts)
        earlier = counts.cumsum(0) - counts
        quotas = (wanted - earlier).clamp(min=0).minimum(counts)
        return quotas.index_select(0, self._places)

    def _agreed(self, scores: Sequence[torch.Tensor], k: int) -> torch.dtype:
        """Return the dtype of all scores, and once see where they are: a rank without any must sum
        with the others, on the device or in host memory."""
        if self._dtype is None:
            mine = {s.dtype for s in scores}, sum(s.numel() for s in scores)
            hosts = {s.device.type == "cpu" for s in scores}
            dtypes, sizes, on_host = zip(*self._gather((*mine, hosts)), strict=True)
            found = set().union(*dtypes) or {torch.float32}
            assert len(found) == 1, f"scores of several dtypes: {found}"
            self._dtype, self._numel = found.pop(), sum(sizes)
            if True in set().union(*on_host):
                self._device = torch.device("cpu")
        assert k <= self._numel, f"k={k} of {self._numel} elements"
        return self._dtype

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._replicated else dist.all_reduce_sum(tensor)

    def _gather(self, value: T) -> list[T]:
        return [value] if self._replicated else dist.all_gather_object(value)


def _boundary(counts: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bin of the ``wanted``-th largest, and how many of it are wanted: () int64 each."""
    from_top = counts.flip(0).cumsum(0)
    position = torch.searchsorted(from_top, wanted.view(1)).clamp(max=counts.numel() - 1)
    above = (from_top - counts.flip(0)).gather(0, position)
    return (counts.numel() - 1 - position).view(()), (wanted - above).view(())
