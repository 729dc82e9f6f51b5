"""The masked update as operators, one implementation per kind of device.

cpu.py (C++) and cuda.py (Triton) implement ``Kernels`` and give the same bits as the torch
reference in masked_adamw.py and update.py, the fallback where neither is available.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch

from pmp_ds.optim.kernels import compiler, cpu
from pmp_ds.optim.kernels.batch import DTYPES, Batch, Coefficients, Master, Tensors


class Kernels(Protocol):
    """The operators of one module, for tensors on its device."""

    def supports(self, dtype: torch.dtype) -> bool:
        """Return whether gradients and weights may be of this one of DTYPES."""
        ...

    def masked_adamw(
        self, batch: Batch, coefficients: Sequence[Coefficients], factor: torch.Tensor | None
    ) -> None:
        """Make one AdamW step on the kept elements of all segments that have a gradient, in place.

        ``coefficients``: of each segment. Gradients are multiplied in fp32 by ``factor``, () fp32;
        NaN changes nothing.
        """
        ...

    def sums_of_squares(self, batch: Batch) -> torch.Tensor:
        """Return the sum of squares of the kept gradients of each segment, (num_segments,) fp64; 0
        for a segment without one."""
        ...


def kernels_for(tensors: Sequence[torch.Tensor], *, master: Master) -> Kernels | None:
    """Return the operators that update the tensors of an optimizer, or None if only torch
    operations can: dense fp32 master weights, or with another ``master`` weights of any of DTYPES
    (ZeRO arms with fp32 flats, and then puts 16-bit weights in their place)."""
    if not tensors:
        return None
    device, dtype = tensors[0].device, tensors[0].dtype
    if any(t.device != device or t.dtype != dtype for t in tensors) or dtype not in DTYPES:
        return None
    if dtype != torch.float32 and master == "dense":
        return None
    if device.type == "cpu":
        return cpu if compiler.library() is not None else None
    return _triton_kernels() if device.type == "cuda" else None


def can_read(kernels: Kernels, tensors: Sequence[Tensors]) -> bool:
    """Return whether the operators can read these gradients and weights: of one dtype each."""
    gradients = {t.gradient.dtype for t in tensors if t.gradient is not None}
    weights = {t.weights.dtype for t in tensors if t.weights is not None}
    return max(len(gradients), len(weights)) <= 1 and all(
        dtype in DTYPES and kernels.supports(dtype) for dtype in gradients | weights
    )


@functools.cache
def _triton_kernels() -> Kernels | None:
    try:
        from pmp_ds.optim.kernels import cuda
    except ImportError as error:
        warnings.warn(
            "the masked optimizer runs in torch operations, many times slower on a GPU: triton "
            f"cannot be imported ({error}); pip install triton, in the version that torch needs",
            stacklevel=4,
        )
        return None
    return cuda
