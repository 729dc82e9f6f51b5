"""The passes over the scores that top-k selection needs, on CPU; in Triton: counting_cuda.py.

A score's *key* is the bit pattern of its magnitude, which orders like the magnitude.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from pmp_ds.ticket.mask import pack

CHUNK = 1 << 17  # elements, a multiple of 8; all temporaries have this size
Scores = Sequence[torch.Tensor]  # (n_i,) fp32, bf16 or fp16 each, contiguous


class Counting(Protocol):
    """What one kind of device offers. ``key`` and ``top`` are (), int64, on the device."""

    def histogram(
        self, scores: Scores, bins: int, shift: int, top: torch.Tensor | None
    ) -> torch.Tensor:
        """Count keys by ``key >> shift``, or with ``top`` by the low 16 bits of those whose high
        bits are ``top``: (bins,) int64."""
        ...

    def equals(self, scores: Scores, key: torch.Tensor) -> list[torch.Tensor]:
        """Count the elements equal to ``key`` in each run of elements of each fragment."""
        ...

    def masks(
        self, scores: Scores, key: torch.Tensor, equals: list[torch.Tensor], quotas: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return packed masks of the keys above ``key`` and in fragment i of the first
        ``quotas[i]`` equal to it, (ceil(n_i / 8),) uint8 each."""
        ...


def keys(scores: torch.Tensor) -> torch.Tensor:
    """Convert magnitudes to ordered int32: (n,) float to (n,) int32."""
    if scores.dtype == torch.float32:
        return scores.view(torch.int32) & 0x7FFFFFFF
    return scores.view(torch.int16).to(torch.int32) & 0x7FFF


def counting_for(device: torch.device) -> Counting:
    """Return the passes for tensors on ``device``."""
    if device.type == "cuda":
        from pmp_ds.ticket.counting_cuda import TritonCounting

        return TritonCounting()
    return CpuCounting()


class CpuCounting:
    """In torch operations, chunk by chunk."""

    def histogram(
        self, scores: Scores, bins: int, shift: int, top: torch.Tensor | None
    ) -> torch.Tensor:
        counts = torch.zeros(bins, dtype=torch.int64)
        with _one_thread():
            for chunk in _chunks(scores):
                found = keys(chunk)
                found = found >> shift if top is None else found[found >> 16 == top] & 0xFFFF
                counts += torch.bincount(found, minlength=bins)
        return counts

    def equals(self, scores: Scores, key: torch.Tensor) -> list[torch.Tensor]:
        with _one_thread():
            found = [[int((keys(c) == key).sum()) for c in _chunks([score])] for score in scores]
        return [torch.tensor(counts, dtype=torch.int64) for counts in found]

    def masks(
        self, scores: Scores, key: torch.Tensor, equals: list[torch.Tensor], quotas: torch.Tensor
    ) -> list[torch.Tensor]:
        with _one_thread():
            return [
                _packed(score, key, counts.tolist(), quota)
                for score, counts, quota in zip(scores, equals, quotas.tolist(), strict=True)
            ]


def _packed(score: torch.Tensor, key: torch.Tensor, counts: list[int], quota: int) -> torch.Tensor:
    bits = torch.empty((score.numel() + 7) // 8, dtype=torch.uint8)
    for chunk, count, out in zip(_chunks([score]), counts, bits.split(CHUNK // 8), strict=False):
        found = keys(chunk)
        kept = found > key
        if count and quota:
            equal = found == key
            if count <= quota:
                kept.logical_or_(equal)
            else:
                kept[equal.nonzero().view(-1)[:quota]] = True
            quota -= min(count, quota)
        out.copy_(pack(kept))
    return bits


def _chunks(scores: Scores) -> Iterator[torch.Tensor]:
    for score in scores:
        if score.numel():
            yield from score.split(CHUNK)


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
