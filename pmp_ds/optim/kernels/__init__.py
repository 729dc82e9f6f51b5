"""The masked update as one operator per kind of device.

cpu.py (C++) and cuda.py (Triton) implement ``Kernels`` and give the same bits as the torch
reference in masked_adamw.py, the fallback where neither is available.
"""

import functools
import warnings
from typing import Protocol

import torch

from pmp_ds.optim.kernels import cpu


class Kernels(Protocol):
    """The operators of one module; all tensors are contiguous and on its device."""

    def block_prefix(self, bits: torch.Tensor) -> torch.Tensor:
        """Return the number of kept elements before each of this module's blocks, once per mask."""
        ...

    def masked_adamw(
        self,
        weights: torch.Tensor,  # (numel,) fp32
        gradient: torch.Tensor,  # (numel,) fp32
        bits: torch.Tensor | None,  # (ceil(numel / 8),) uint8; None: all kept
        prefix: torch.Tensor | None,  # block_prefix(bits)
        exp_avg: torch.Tensor,  # (num_kept,) fp32
        exp_avg_sq: torch.Tensor,  # (num_kept,) fp32
        coefficients: cpu.Coefficients,
    ) -> None:
        """Make one AdamW step on the kept elements, in place."""
        ...

    def has_compact_master(self, dtype: torch.dtype) -> bool:
        """Return whether ``masked_adamw_master`` supports weights of this 16-bit dtype."""
        ...

    def masked_adamw_master(
        self,
        weights: torch.Tensor,  # (numel,) bf16 or fp16
        gradient: torch.Tensor,  # (numel,) fp32 or the dtype of the weights
        bits: torch.Tensor | None,
        prefix: torch.Tensor | None,
        exp_avg: torch.Tensor,  # (num_kept,) fp32
        exp_avg_sq: torch.Tensor,  # (num_kept,) fp32
        coefficients: cpu.Coefficients,
        master: torch.Tensor,  # (num_kept,) fp32
        factor: float,
    ) -> None:
        """Make one AdamW step on the compact fp32 ``master``, in place, with the gradient times
        ``factor``; the kept weights become the rounded master."""
        ...

    def zero_complement(
        self,
        values: torch.Tensor,  # (numel,) fp32, bf16 or fp16
        bits: torch.Tensor,
        start: int,
    ) -> None:
        """Zero each value i whose bit ``start + i`` is 0, in place."""
        ...


def kernels_for(tensor: torch.Tensor) -> Kernels | None:
    """Return the operators for ``tensor``, or None where only torch operations can update it."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if tensor.device.type == "cpu":
        return cpu if cpu.library() is not None else None
    return _triton_kernels() if tensor.device.type == "cuda" else None


@functools.cache
def _triton_kernels() -> Kernels | None:
    try:
        from pmp_ds.optim.kernels import cuda
    except ImportError as error:
        warnings.warn(
            "the masked optimizer runs in torch operations, many times slower on a GPU: triton "
            f"cannot be imported ({error}); pip install triton, in the version that torch requires",
            stacklevel=4,
        )
        return None
    return cuda
