"""The C++ operators of the masked update; ``Kernels`` has the contract."""

import ctypes
from collections.abc import Sequence

import torch

from pmp_ds.optim.kernels import compiler
from pmp_ds.optim.kernels.batch import BLOCK, MASTERS, TYPES, Batch, Coefficients


class CBatch(ctypes.Structure):
    """`Batch` as masked_adamw.cpp declares it."""

    _fields_ = [
        ("num_blocks", ctypes.c_int64),
        ("num_segments", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("segment", "first", "kept_before", "kept_count")),
        *((name, ctypes.c_void_p) for name in ("begin", "end", "place", "addresses")),
        *((name, ctypes.c_void_p) for name in ("coefficients", "factor")),
        ("gradient_type", ctypes.c_int32),
        ("weight_type", ctypes.c_int32),
        ("master", ctypes.c_int32),
        ("moments", ctypes.c_int32),
    ]

    @classmethod
    def of(
        cls,
        batch: Batch,
        coefficients: torch.Tensor | None = None,
        factor: torch.Tensor | None = None,
    ) -> "CBatch":
        layout = batch.layout
        return cls(
            num_blocks=layout.num_blocks,
            num_segments=len(layout.segments),
            segment=layout.segment.data_ptr(),
            first=layout.first.data_ptr(),
            kept_before=layout.kept_before.data_ptr(),
            kept_count=layout.kept_count.data_ptr(),
            begin=layout.begin.data_ptr(),
            end=layout.end.data_ptr(),
            place=layout.place.data_ptr(),
            addresses=batch.addresses.data_ptr(),
            coefficients=None if coefficients is None else coefficients.data_ptr(),
            factor=None if factor is None else factor.data_ptr(),
            gradient_type=TYPES[batch.gradient_dtype],
            weight_type=TYPES[batch.weight_dtype],
            master=MASTERS[batch.master],
            moments=batch.moments.number,
        )


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
