"""Packed selections as bool masks, and the memory of a selection."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from pmp_ds.ticket.mask import unpack
from pmp_ds.ticket.topk import select_top_k


def select_masks(
    scores: Sequence[torch.Tensor],
    starts: Sequence[int],
    names: Sequence[str],
    k: int,
    **options: Any,
) -> list[torch.Tensor]:
    """Call ``select_top_k`` and unpack the result: (n_i,) bool each."""
    packed = select_top_k(scores, starts, names, k, **options)
    for score, bits in zip(scores, packed, strict=True):
        assert bits.dtype == torch.uint8
        assert bits.numel() == (score.numel() + 7) // 8
    return [unpack(bits, len(score)) for score, bits in zip(scores, packed, strict=True)]


_PEAK = """
import torch
from pmp_ds.ticket.topk import select_top_k

def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))

torch.set_num_threads(1)
scores = torch.randn({numel}).to(torch.{dtype})
select_top_k([scores[:300000]], [0], ["w"], 210000, replicated=True)  # whatever loads at first use
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
before = peak()
bits = select_top_k([scores], [0], ["w"], {k}, replicated=True)
print((peak() - before) * 1024 - bits[0].nbytes)
"""


def extra_bytes(numel: int, k: int, dtype: str) -> int:
    """Return the peak memory of a selection beyond its scores and packed mask, in a fresh
    process."""
    program = _PEAK.format(numel=numel, k=k, dtype=dtype)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return int(run.stdout)
