"""low_bit.py in Triton: moments and master weights in fewer bits than fp32.

A ``TOP`` of 15 stands for first moments, which have a sign, and 31 for second ones: it is the
largest exponent of an 8-bit code. ``address`` is that of a tensor, ``exponent`` that of the block's
shared one, ``compact`` the places of the block's elements in compact state, ``kept`` whether they
are kept.
"""

import triton
import triton.language as tl

from pmp_ds.config.moments import MOMENTS as FORMATS

IN_32, IN_16 = (tl.constexpr(FORMATS[name].number) for name in ("fp32", "bf16"))


@triton.jit
def random_words(place, key, MOMENTS: tl.constexpr):
    """32 random bits for each of these elements of a parameter; 0 where nothing is rounded."""
    if MOMENTS == IN_32:
        return tl.zeros_like(place).to(tl.uint32)
    else:
        keys = key.to(tl.pointer_type(tl.uint32))
        x = _mix(place.to(tl.uint32) ^ tl.load(keys))
        return _mix(x + (place >> 32).to(tl.uint32) + tl.load(keys + 1))


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def moments(address, exponent, compact, kept, TOP: tl.constexpr, MOMENTS: tl.constexpr):
    """The moments of the kept elements of a block, fp32; 0 elsewhere."""
    if MOMENTS == IN_32:
        return tl.load(address.to(tl.pointer_type(tl.float32)) + compact, mask=kept, other=0)
    elif MOMENTS == IN_16:
        bits = tl.load(address.to(tl.pointer_type(tl.int16)) + compact, mask=kept, other=0)
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        code = tl.load(address.to(tl.pointer_type(tl.uint8)) + compact, mask=kept, other=0)
        shared = tl.load(exponent.to(tl.pointer_type(tl.uint8))).to(tl.int32)
        code = code.to(tl.int32)
        size = code & 0x7F if TOP == 15 else code
        power = size >> 3
        mantissa = (size & 7) + tl.where(power > 0, 8, 0)
        step = shared - TOP - 2 + tl.where(power > 0, power - 1, 0)
        value = mantissa.to(tl.float32) * (step << 23).to(tl.float32, bitcast=True)
        if TOP == 15:
            sign = (code >> 7) << 31  # a minus would lose that of 0
            value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        return value


@triton.jit
def store_moments(
    value, address, exponent, compact, kept, word, TOP: tl.constexpr, MOMENTS: tl.constexpr
):
    """Store the moments of the kept elements of a block; ``word`` has 16 random bits for each."""
    if MOMENTS == IN_32:
        tl.store(address.to(tl.pointer_type(tl.float32)) + compact, value, mask=kept)
    elif MOMENTS == IN_16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = tl.where(value == value, (bits + word) >> 16, 0x7FC0)
        out = address.to(tl.pointer_type(tl.int16)) + compact
        tl.store(out, rounded.to(tl.int16), mask=kept)
    else:
        bits = value.to(tl.int32, bitcast=True)
        size = tl.where(kept, bits & 0x7FFFFFFF, 0)
        shared = (tl.max(size, 0).to(tl.uint32) + 0xFFFFF) >> 23
        shared = tl.minimum(tl.maximum(shared.to(tl.int32), 40), 254)
        word = word.to(tl.int32)
        normal = ((size + word * 16) >> 20) - ((shared - TOP) << 3)
        inverse = ((256 + TOP - shared) << 23).to(tl.float32, bitcast=True)
        steps = tl.minimum(size.to(tl.float32, bitcast=True) * inverse, 8.0)
        small = (steps + word.to(tl.float32) * (1.0 / 65536)).to(tl.int32)
        code = tl.minimum(tl.where((size >> 23) >= shared - TOP + 1, normal, small), 8 * TOP + 7)
        if TOP == 15:
            code = code | tl.where(bits < 0, 0x80, 0)
        else:
            code = tl.where((code == 0) & (size != 0), 1, code)
        tl.store(address.to(tl.pointer_type(tl.uint8)) + compact, code.to(tl.uint8), mask=kept)
        updated = tl.max(kept.to(tl.int32), 0) > 0
        tl.store(exponent.to(tl.pointer_type(tl.uint8)), shared.to(tl.uint8), mask=updated)


@triton.jit
def join(high, low):
    """fp32 master weights of the bits of bf16 weights and their lower bits, int16 each."""
    low = low.to(tl.int32) & 0xFFFF
    bits = ((high.to(tl.int32) - (low >> 15)) << 16) | low
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def split(value):
    """The lower bits of fp32 master weights whose bf16 weights are their nearest ones, int16."""
    bits = value.to(tl.int32, bitcast=True)
    low = bits & 0xFFFF
    return tl.where(low == 0x8000, 0x7FFF + 2 * ((bits >> 16) & 1), low).to(tl.int16)
