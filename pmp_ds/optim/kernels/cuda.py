"""The Triton operators of the masked update, for GPU tensors (contract: ``Kernels``).

One program updates one block. It reads dense weights and gradients as whole cache lines and the
moments of its kept elements contiguously; they start at the number of kept elements before the
block. Contraction is off, and division and square root are correctly rounded, so every element
gets the same bits as from the C++ operator and the torch reference.

This module needs triton, which comes with torch's CUDA build: import it through ``kernels_for``.
With TRITON_INTERPRET=1 set before triton is first imported, the operators run, slowly, on CPU
tensors: for tests.
"""

import torch
import triton
import triton.language as tl

from pmp_ds.optim.kernels import checks, cpu

BLOCK = 1024  # elements per program and per entry of `prefix`, a multiple of 8
WARPS = 8
_BITS_OF_SIZE = {2: torch.int16, 4: torch.int32}  # bytes per value -> integer type to copy it as


def block_prefix(bits: torch.Tensor) -> torch.Tensor:
    """Return the number of kept elements before each block, (ceil(8 * len(bits) / BLOCK),)."""
    return cpu.kept_before_blocks(bits, BLOCK)


def masked_adamw(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    bits: torch.Tensor | None,
    prefix: torch.Tensor | None,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    coefficients: cpu.Coefficients,
) -> None:
    """Make one AdamW step on the kept elements, in place."""
    checks.step(
        weights,
        gradient,
        bits,
        prefix,
        {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq},
        weight_dtypes=(torch.float32,),
        gradient_dtypes=(torch.float32,),
        block=BLOCK,
    )
    tensors = weights, gradient, bits, prefix, exp_avg, exp_avg_sq
    numel = weights.numel()
    if numel == 0:
        return
    with torch.cuda.device_of(weights):
        _masked_adamw[(triton.cdiv(numel, BLOCK),)](
            *tensors,
            numel,
            **{name: getattr(coefficients, name) for name, *_ in coefficients._fields_},
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def has_compact_master(dtype: torch.dtype) -> bool:
    """Return False: on a GPU, torch operations do this."""
    return False


def masked_adamw_master(*_: object) -> None:
    raise AssertionError("has_compact_master is False")


def zero_complement(values: torch.Tensor, bits: torch.Tensor, start: int) -> None:
    """Zero each value i whose bit ``start + i`` is 0, in place."""
    allowed = (torch.float32, *checks.SIXTEEN_BIT)
    checks.require("the gradient", values, allowed, None, values.device)
    checks.packed(bits, values.numel(), values.device, start)
    numel = values.numel()
    if numel == 0:
        return
    raw = values.view(-1).view(_BITS_OF_SIZE[values.element_size()])
    with torch.cuda.device_of(values):
        _zero_complement[(triton.cdiv(numel, BLOCK),)](
            raw, bits, start, numel, BLOCK=BLOCK, num_warps=WARPS
        )


@triton.jit
def _index(BLOCK: tl.constexpr):
    """Return the elements of this program. Without the hint, the compiler gives each thread four
    neighbours, and a warp's compact accesses touch four times as many sectors."""
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), 1)
    return tl.program_id(0).to(tl.int64) * BLOCK + lanes


@triton.jit
def _is_kept(bits, index, inside):
    byte = tl.load(bits + index // 8, mask=inside, other=0).to(tl.int32)
    return ((byte >> (index % 8).to(tl.int32)) & 1) != 0


# Sizes vary between tensors and coefficients between steps; the kernel is specialized for neither
# (Triton never treats floats as constants).
@triton.jit(do_not_specialize=["numel"])
def _masked_adamw(
    weights,
    gradient,
    bits,
    prefix,
    exp_avg,
    exp_avg_sq,
    numel,
    decay,
    beta1,
    grad_weight,
    beta2,
    grad_sq_weight,
    minus_step_size,
    sqrt_correction2,
    eps,
    BLOCK: tl.constexpr,
):
    index = _index(BLOCK)
    inside = index < numel
    p = tl.load(weights + index, mask=inside)
    g = tl.load(gradient + index, mask=inside)
    if bits is None:
        kept = inside
        place = index
    else:
        kept = _is_kept(bits, index, inside)
        rank = tl.cumsum(kept.to(tl.int32), 0) - 1
        place = tl.load(prefix + tl.program_id(0)) + rank
    m = tl.load(exp_avg + place, mask=kept)
    v = tl.load(exp_avg_sq + place, mask=kept)
    m = m * beta1 + g * grad_weight
    v = v * beta2 + g * g * grad_sq_weight
    denominator = tl.div_rn(tl.sqrt_rn(v), sqrt_correction2) + eps
    updated = p * decay + tl.div_rn(m * minus_step_size, denominator)
    tl.store(exp_avg + place, m, mask=kept)
    tl.store(exp_avg_sq + place, v, mask=kept)
    tl.store(weights + index, tl.where(kept, updated, p), mask=inside)


@triton.jit(do_not_specialize=["start", "numel"])
def _zero_complement(values, bits, start, numel, BLOCK: tl.constexpr):
    index = _index(BLOCK)
    inside = index < numel
    value = tl.load(values + index, mask=inside)
    kept = _is_kept(bits, start + index, inside)
    tl.store(values + index, tl.where(kept, value, 0), mask=inside)
