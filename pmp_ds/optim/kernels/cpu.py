"""The C++ operators of the masked update; ``Kernels`` has the contract."""

import ctypes
from collections.abc import Sequence

import torch

from pmp_ds.optim.kernels import compiler
from pmp_ds.optim.kernels.batch import BLOCK, Batch, CBatch, Coefficients


def supports(dtype: torch.dtype) -> bool:
    """Return False for fp16 where the compiler lacks it."""
    return dtype != torch.float16 or bool(_loaded().pmp_has_fp16())


def masked_adamw(
    batch: Batch, coefficients: Sequence[Coefficients], factor: torch.Tensor | None
) -> None:
    """Make one AdamW step on the kept elements of all segments with a gradient, in place."""
    on_device, times = batch.on_device(coefficients), batch.factor(factor)
    _loaded().pmp_masked_adamw(ctypes.byref(CBatch.of(batch, on_device, times)), _threads())


def sums_of_squares(batch: Batch) -> torch.Tensor:
    """Return the sum of squares of the kept gradients of each segment, (num_segments,) fp64."""
    sums = torch.empty(batch.layout.num_blocks, dtype=torch.float64)
    _loaded().pmp_sums_of_squares(
        ctypes.byref(CBatch.of(batch)), ctypes.c_void_p(sums.data_ptr()), _threads()
    )
    return batch.layout.by_segment(sums)


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def _loaded() -> ctypes.CDLL:
    loaded = compiler.library()
    assert loaded is not None, "kernels_for offers these operators only where they are compiled"
    assert loaded.pmp_block() == BLOCK
    return loaded
