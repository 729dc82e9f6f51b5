"""The passes of counting.py in Triton: one read of the scores each, no wait for the device.

With TRITON_INTERPRET=1 set before triton is first imported, they run on CPU tensors: for tests.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from pmp_ds.ticket.counting import Scores

BLOCK = 1024  # elements per program, a multiple of 8


class TritonCounting:
    """``Counting`` for tensors on a GPU."""

    def histogram(
        self, scores: Scores, bins: int, shift: int, top: torch.Tensor | None
    ) -> torch.Tensor:
        device = scores[0].device if scores else None
        counts = torch.zeros(bins, dtype=torch.int64, device=device)
        for score in scores:
            _launch(_histogram, score, counts, shift, top, WITHIN=top is not None)
        return counts

    def equals(self, scores: Scores, key: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for score in scores:
            counts = torch.zeros(
                max(1, triton.cdiv(score.numel(), BLOCK)), dtype=torch.int64, device=score.device
            )
            _launch(_equals, score, counts, key)
            found.append(counts)
        return found

    def masks(
        self, scores: Scores, key: torch.Tensor, equals: list[torch.Tensor], quotas: torch.Tensor
    ) -> list[torch.Tensor]:
        found = []
        for score, counts, quota in zip(scores, equals, quotas.unbind(), strict=True):
            bits = torch.empty((score.numel() + 7) // 8, dtype=torch.uint8, device=score.device)
            before = counts.cumsum(0) - counts
            _launch(_masks, score, bits, key, before, quota)
            found.append(bits)
        return found


def _launch(kernel: Any, score: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    numel, wide = score.numel(), score.element_size() == 4
    if not numel:
        return
    raw = score.view(torch.int32 if wide else torch.int16)
    with torch.cuda.device_of(score):
        kernel[(triton.cdiv(numel, BLOCK),)](
            raw, numel, *arguments, SIGN=0x7FFFFFFF if wide else 0x7FFF, BLOCK=BLOCK, **constants
        )


@triton.jit
def _keys(raw, numel, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    return tl.load(raw + index, mask=inside, other=0).to(tl.int32) & SIGN, inside


@triton.jit(do_not_specialize=["numel", "shift"])
def _histogram(
    raw, numel, counts, shift, top, WITHIN: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr
):
    keys, counted = _keys(raw, numel, SIGN, BLOCK)
    if WITHIN:
        counted = counted & ((keys >> 16).to(tl.int64) == tl.load(top))
        place = keys & 0xFFFF
    else:
        place = keys >> shift
    tl.atomic_add(counts + place, tl.full((BLOCK,), 1, tl.int64), mask=counted, sem="relaxed")


@triton.jit(do_not_specialize=["numel"])
def _equals(raw, numel, counts, key, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    keys, inside = _keys(raw, numel, SIGN, BLOCK)
    equal = inside & (keys.to(tl.int64) == tl.load(key))
    tl.store(counts + tl.program_id(0), tl.sum(equal.to(tl.int32), 0).to(tl.int64))


@triton.jit(do_not_specialize=["numel"])
def _masks(raw, numel, bits, key, before, quota, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    keys, inside = _keys(raw, numel, SIGN, BLOCK)
    threshold = tl.load(key)
    equal = (inside & (keys.to(tl.int64) == threshold)).to(tl.int32)
    rank = tl.load(before + tl.program_id(0)) + tl.cumsum(equal, 0) - equal
    kept = (keys.to(tl.int64) > threshold) | ((equal != 0) & (rank < tl.load(quota)))
    values = tl.reshape((inside & kept).to(tl.int32), (BLOCK // 8, 8))
    packed = tl.sum(values << tl.arange(0, 8)[None, :], 1).to(tl.uint8)
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(bits + byte, packed, mask=byte * 8 < numel)
