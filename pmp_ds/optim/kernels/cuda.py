"""The Triton operators of the masked update; ``Kernels`` has the contract.

One program updates one block: dense weights and gradients as whole cache lines, the moments of its
kept elements next to each other, at the number of kept elements before the block plus the rank
inside it. Contraction is off, and division and square root are correctly rounded, so the bits are
those of the C++ operator and the torch reference.

Importing this module needs triton, which comes with torch's CUDA build: go by way of
``kernels_for``. With TRITON_INTERPRET=1 set before triton is first imported, the same operators
run on CPU tensors, slowly: for tests.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from pmp_ds.optim.kernels.batch import BLOCK, MASTERS, TYPES, Batch, Coefficients
from pmp_ds.optim.kernels.cuda_low_bit import join, moments, random_words, split, store_moments

WARPS = 8
_FP32, _BF16, _FP16 = (
    tl.constexpr(TYPES[t]) for t in (torch.float32, torch.bfloat16, torch.float16)
)
_DENSE, _SPLIT = (tl.constexpr(MASTERS[where]) for where in ("dense", "split"))
_ROW = tl.constexpr(10)  # of coefficients: eight numbers and two keys


def supports(dtype: torch.dtype) -> bool:
    """Return True: Triton has all of DTYPES."""
    return True


def masked_adamw(
    batch: Batch, coefficients: Sequence[Coefficients], factor: torch.Tensor | None
) -> None:
    """Make one AdamW step on the kept elements of all segments with a gradient, in place."""
    on_device, times = batch.on_device(coefficients), batch.factor(factor)
    _launch(
        _masked_adamw,
        batch,
        batch.layout.place,
        on_device,
        times,
        **_types(batch),
        MASTER=MASTERS[batch.master],
        MOMENTS=batch.moments.number,
    )


def sums_of_squares(batch: Batch) -> torch.Tensor:
    """Return the sum of squares of the kept gradients of each segment, (num_segments,) fp64."""
    layout = batch.layout
    sums = torch.empty(layout.num_blocks, dtype=torch.float64, device=layout.device)
    _launch(_sums_of_squares, batch, sums, GRADIENT=TYPES[batch.gradient_dtype])
    return layout.by_segment(sums)


def _types(batch: Batch) -> dict[str, int]:
    return {"GRADIENT": TYPES[batch.gradient_dtype], "WEIGHTS": TYPES[batch.weight_dtype]}


def _launch(kernel: Any, batch: Batch, *arguments: torch.Tensor, **constants: Any) -> None:
    layout = batch.layout
    if not layout.num_blocks or batch.gradient_dtype is None:
        return
    table = layout.segment, layout.first, layout.kept_before, layout.kept_count
    with torch.cuda.device_of(layout.first):
        kernel[(layout.num_blocks,)](
            *table,
            layout.begin,
            layout.end,
            batch.addresses,
            len(layout.segments),
            *arguments,
            **constants,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


@triton.jit
def _pointer(address, TYPE: tl.constexpr):
    if TYPE == _FP32:
        return address.to(tl.pointer_type(tl.float32))
    elif TYPE == _BF16:
        return address.to(tl.pointer_type(tl.bfloat16))
    else:
        return address.to(tl.pointer_type(tl.float16))


@triton.jit
def _kept_gradients(
    segment,
    first,
    kept_before,
    kept_count,
    begin,
    end,
    addresses,
    num_segments,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The block of this program: its segment, places in the segment, whether they are kept, their
    places in the compact state, and gradients, fp32."""
    block = tl.program_id(0)
    number = tl.load(segment + block)
    start = tl.load(first + block)
    # The hint keeps the compiler from giving a thread several in a row: then a warp's compact
    # accesses would touch several times as many sectors.
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), 1)
    index = start + lanes
    inside = index < tl.load(end + number)
    place = index - tl.load(begin + number)
    address = tl.load(addresses + number)
    mask = tl.load(addresses + 5 * num_segments + number)
    bits = mask.to(tl.pointer_type(tl.uint8)) + index // 8
    byte = tl.load(bits, mask=inside & (mask != 0), other=255).to(tl.int32)  # without one: all kept
    kept = inside & (((byte >> (index % 8).to(tl.int32)) & 1) != 0)
    rank = tl.cumsum(kept.to(tl.int32), 0) - 1
    # There are more ones than when the moments were made only if memory has gone bad.
    kept = kept & (rank < tl.load(kept_count + block))
    compact = tl.load(kept_before + block) + rank
    kept = kept & (address != 0)
    gradient = tl.load(_pointer(address, GRADIENT) + place, mask=kept, other=0).to(tl.float32)
    return number, place, kept, compact, gradient


@triton.jit(do_not_specialize=["num_segments"])
def _masked_adamw(
    segment,
    first,
    kept_before,
    kept_count,
    begin,
    end,
    addresses,
    num_segments,
    places,
    coefficients,
    factor,
    GRADIENT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    MASTER: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    times = tl.load(factor)
    if times == times:
        number, place, kept, compact, g = _kept_gradients(
            segment,
            first,
            kept_before,
            kept_count,
            begin,
            end,
            addresses,
            num_segments,
            GRADIENT,
            BLOCK,
        )
        g = g * times
        row = addresses + number
        weights = tl.load(row + num_segments)
        master = tl.load(row + 2 * num_segments)
        exp_avg = tl.load(row + 3 * num_segments)
        exp_avg_sq = tl.load(row + 4 * num_segments)
        in_segment = (tl.load(first + tl.program_id(0)) - tl.load(begin + number)) // BLOCK
        exponent = tl.load(row + 6 * num_segments) + in_segment
        exponent_sq = tl.load(row + 7 * num_segments) + in_segment
        c = coefficients + number * _ROW
        if MASTER == _SPLIT:
            high = tl.load(weights.to(tl.pointer_type(tl.int16)) + place, mask=kept, other=0)
            low = tl.load(master.to(tl.pointer_type(tl.int16)) + compact, mask=kept, other=0)
            p = join(high, low)
        else:
            where = place if MASTER == _DENSE else compact
            p = tl.load(master.to(tl.pointer_type(tl.float32)) + where, mask=kept)
        m = moments(exp_avg, exponent, compact, kept, 15, MOMENTS)
        v = moments(exp_avg_sq, exponent_sq, compact, kept, 31, MOMENTS)
        m = m * tl.load(c + 1) + g * tl.load(c + 2)
        v = v * tl.load(c + 3) + g * g * tl.load(c + 4)
        denominator = tl.div_rn(tl.sqrt_rn(v), tl.load(c + 6)) + tl.load(c + 7)
        p = p * tl.load(c) + tl.div_rn(m * tl.load(c + 5), denominator)
        word = random_words(tl.load(places + number) + place, c + 8, MOMENTS)
        store_moments(m, exp_avg, exponent, compact, kept, word & 0xFFFF, 15, MOMENTS)
        store_moments(v, exp_avg_sq, exponent_sq, compact, kept, word >> 16, 31, MOMENTS)
        if MASTER == _SPLIT:
            tl.store(master.to(tl.pointer_type(tl.int16)) + compact, split(p), mask=kept)
        else:
            where = place if MASTER == _DENSE else compact
            tl.store(master.to(tl.pointer_type(tl.float32)) + where, p, mask=kept)
        if WEIGHTS != 0:
            kept = kept & (weights != 0)
            if WEIGHTS == _BF16:
                rounded = weights.to(tl.pointer_type(tl.int16)) + place
                tl.store(rounded, _round_to_bf16(p), mask=kept)
            else:
                tl.store(_pointer(weights, WEIGHTS) + place, p, mask=kept)


@triton.jit
def _round_to_bf16(value):
    """The nearest bf16, ties to even, as its bits, int16. In integers: the interpreter's own
    conversion truncates."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, rounded, 0x7FC0).to(tl.int16)


@triton.jit(do_not_specialize=["num_segments"])
def _sums_of_squares(
    segment,
    first,
    kept_before,
    kept_count,
    begin,
    end,
    addresses,
    num_segments,
    sums,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _number, _place, _kept, _compact, g = _kept_gradients(
        segment,
        first,
        kept_before,
        kept_count,
        begin,
        end,
        addresses,
        num_segments,
        GRADIENT,
        BLOCK,
    )
    g = g.to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(g * g, 0))
