"""Exactly the k largest magnitudes of a vector that is spread over the ranks.

A float's bits without the sign order like its magnitude. So instead of sorting, count: a
histogram of the high 15 bits, summed over ranks, finds the bin that holds the k-th largest; for
fp32 a second one of the low 16 bits inside that bin finds the value itself. Elements equal to it
are taken by lowest global index until there are exactly k. Two passes (one for 16-bit scores),
256 KB + 512 KB of communication, temporary memory of one chunk: the result is the same bits for
any number of ranks and any sharding.
"""

from collections.abc import Callable, Sequence

import torch

from pmp_ds import dist
from pmp_ds.errors import UserError

CHUNK = 1 << 20
_NON_FINITE = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}

Reduce = Callable[[torch.Tensor], torch.Tensor]


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """Magnitudes as ordered int32: (n,) float to (n,) int32."""
    if scores.dtype == torch.float32:
        return scores.view(torch.int32) & 0x7FFFFFFF
    return scores.view(torch.int16).to(torch.int32) & 0x7FFF


def _chunks(scores: torch.Tensor) -> list[torch.Tensor]:
    return list(scores.split(CHUNK)) if scores.numel() else []


def select_top_k(
    scores: Sequence[torch.Tensor],  # (n_i,) fp32, bf16 or fp16 each, contiguous; sign ignored
    starts: Sequence[int],  # global index of each fragment's first element
    names: Sequence[str],  # parameter of each fragment, for errors
    k: int,
    *,
    keep_all: Sequence[bool] | None = None,
    replicated: bool = False,
) -> list[torch.Tensor]:
    """Masks of the k largest scores over all fragments of all ranks; (n_i,) bool each.

    Ties go to the lowest global index. Fragments flagged in ``keep_all`` are kept whole and count
    towards k. ``replicated`` says that every rank holds all fragments, so nothing is summed.
    Collective: every rank calls it, also one without fragments. Raises UserError on every rank
    when a score is not finite, naming its parameter, or when ``keep_all`` leaves no room.
    """
    reduce: Reduce = (lambda tensor: tensor) if replicated else dist.all_reduce_sum
    flags = list(keep_all) if keep_all is not None else [False] * len(scores)
    device = scores[0].device if scores else dist.device()
    ranked = [i for i, whole in enumerate(flags) if not whole]
    dtype = _common_dtype([scores[i].dtype for i in ranked], replicated)

    sizes = torch.tensor(
        [sum(s.numel() for s, whole in zip(scores, flags, strict=True) if whole == side)
         for side in (True, False)],
        dtype=torch.int64, device=device,
    )  # fmt: skip
    num_whole, num_ranked = (int(n) for n in reduce(sizes))
    wanted = k - num_whole
    if not 0 <= wanted <= num_ranked:
        raise UserError(
            f"the ticket keeps k={k} elements, but {num_whole} of {num_whole + num_ranked} are "
            "always trained (mask.always_train): choose a mask.density that leaves room, or "
            "switch mask.always_train off"
        )
    threshold, quotas = _threshold(
        [scores[i] for i in ranked], [starts[i] for i in ranked], [names[i] for i in ranked],
        wanted, dtype, device, reduce, replicated,
    )  # fmt: skip
    quota_of = dict(zip(ranked, quotas, strict=True))
    return [
        torch.ones_like(s, dtype=torch.bool)
        if flags[i]
        else _fragment_mask(s, threshold, quota_of[i])
        for i, s in enumerate(scores)
    ]


def _common_dtype(dtypes: list[torch.dtype], replicated: bool) -> torch.dtype:
    """The one dtype of the scores on all ranks; a rank without fragments learns it here."""
    seen = set(dtypes)
    if not replicated:
        seen = set().union(*dist.all_gather_object(seen))
    assert len(seen) <= 1, f"scores of several dtypes: {seen}"
    return seen.pop() if seen else torch.float32


def _threshold(
    scores: list[torch.Tensor],
    starts: list[int],
    names: list[str],
    wanted: int,
    dtype: torch.dtype,
    device: torch.device,
    reduce: Reduce,
    replicated: bool,
) -> tuple[int, list[int]]:
    """The smallest kept key, and how many of its equals each local fragment keeps."""
    shift = 16 if dtype == torch.float32 else 0
    high = _histogram(scores, 1 << 15, device, lambda keys: keys >> shift)
    reduce(high)
    if int(high[_NON_FINITE[dtype] >> shift :].sum()):
        _raise_non_finite(scores, names, dtype, replicated)
    if wanted == 0:
        return 1 << 31, [0] * len(scores)
    bin_high, above = _boundary(high, wanted)
    key, ties = bin_high, int(high[bin_high])
    if shift:
        low = _histogram(
            scores, 1 << 16, device, lambda keys: keys[keys >> 16 == bin_high] & 0xFFFF
        )
        reduce(low)
        bin_low, above_low = _boundary(low, wanted - above)
        above += above_low
        key, ties = bin_high << 16 | bin_low, int(low[bin_low])
    return key, _tie_quotas(scores, starts, key, wanted - above, ties, replicated)


def _histogram(
    scores: list[torch.Tensor],
    num_bins: int,
    device: torch.device,
    to_bin: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    counts = torch.zeros(num_bins, dtype=torch.int64, device=device)
    for score in scores:
        for chunk in _chunks(score):
            counts += torch.bincount(to_bin(_keys(chunk)), minlength=num_bins)
    return counts


def _boundary(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the ``wanted``-th largest, and how many lie in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, wanted))
    above = int(from_top[position - 1]) if position else 0
    return counts.numel() - 1 - position, above


def _tie_quotas(
    scores: list[torch.Tensor],
    starts: list[int],
    key: int,
    wanted: int,
    ties: int,
    replicated: bool,
) -> list[int]:
    """How many elements equal to ``key`` each local fragment keeps; lowest global index first."""
    if wanted == ties:
        return [score.numel() for score in scores]
    local = [
        (start, sum(int((_keys(c) == key).sum()) for c in _chunks(score)))
        for start, score in zip(starts, scores, strict=True)
    ]
    gathered = [local] if replicated else dist.all_gather_object(local)
    quotas: dict[int, int] = {}
    for start, count in sorted(fragment for rank in gathered for fragment in rank if fragment[1]):
        quotas[start] = min(count, wanted)
        wanted -= quotas[start]
    return [quotas.get(start, 0) for start in starts]


def _fragment_mask(score: torch.Tensor, threshold: int, quota: int) -> torch.Tensor:
    mask = torch.empty_like(score, dtype=torch.bool)
    for chunk, out in zip(_chunks(score), mask.split(CHUNK), strict=True):
        keys = _keys(chunk)
        torch.gt(keys, threshold, out=out)
        if quota:
            ties = (keys == threshold).nonzero().view(-1)[:quota]
            out[ties] = True
            quota -= ties.numel()
    return mask


def _raise_non_finite(
    scores: list[torch.Tensor], names: list[str], dtype: torch.dtype, replicated: bool
) -> None:
    local = [
        name
        for name, score in zip(names, scores, strict=True)
        if any(bool((_keys(chunk) >= _NON_FINITE[dtype]).any()) for chunk in _chunks(score))
    ]
    gathered = [local] if replicated else dist.all_gather_object(local)
    rank, name = next((rank, found[0]) for rank, found in enumerate(gathered) if found)
    raise UserError(
        f"the gradient of {name} is not finite (rank {rank}): discovery stops; lower train.lr, "
        "lengthen train.warmup_steps or use a wider precision"
    )
