"""Numbers in fewer bits than fp32, in torch operations; the operators of kernels/ give the same.

- bf16 moments are rounded up or down at random, in proportion to the distances. To the nearest,
  a second moment would never change by less than 1 / 256 of itself.
- 8-bit moments are floating-point numbers of 3 bits of mantissa whose exponents count from one
  that the block shares: 4 bits of exponent and a sign for first moments, a range of 2 ** 17; 5
  bits for second moments, which are never negative, a range of 2 ** 33. They are rounded at random
  too. Every value is exact in bf16.
- A split master weight is a bf16 weight and the lower 16 bits of the fp32 one. Halfway between two
  weights, these bits move by one, towards the weight that it was rounded to: else nobody could
  tell from which side it came.

The random bits are a hash of an element's place in its parameter, the parameter's name and the
number of the update: the same on any number of ranks, and nothing to save.
"""

import hashlib

import torch

_32 = 0xFFFFFFFF
_64 = 0xFFFFFFFFFFFFFFFF
_MANTISSA = 3  # bits of an 8-bit moment
_DROPPED = 23 - _MANTISSA
LOWEST_EXPONENT = 40
"""Of a block of 8-bit moments, biased as in fp32: every power of two computed from it is normal."""
_HIGHEST_EXPONENT = 254
NEAREST = 0x8000
"""In place of random bits: round to the nearest, halfway up."""


def stream_of(name: str) -> int:
    """Return the number of the random stream of a parameter, in [0, 2 ** 64)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def key_of(stream: int, update: int) -> tuple[int, int]:
    """Return the key of one update's random bits, two numbers in [0, 2 ** 32)."""
    x = (stream + update * 0x9E3779B97F4A7C15) & _64  # splitmix64 (Steele et al., 2014)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64
    x ^= x >> 31
    return x & _32, x >> 32


def random_bits(places: torch.Tensor, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 16 random bits for the first and 16 for the second moment of the elements at
    ``places`` of their parameter, (n,) int64: (n,) int64 each."""
    x = _mix((places & _32) ^ key[0])
    x = _mix((x + (places >> 32) + key[1]) & _32)
    return x & 0xFFFF, x >> 16


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32 bits in which every bit of the input moves half of the output's."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _32
    return x ^ (x >> 16)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Return the bits of fp32 numbers as int64 in [0, 2 ** 32)."""
    return values.view(torch.int32).to(torch.int64) & _32


def _float(bits: torch.Tensor) -> torch.Tensor:
    """Return the fp32 numbers of these bits, the reverse of ``_bits``."""
    return bits.to(torch.int32).view(torch.float32)


def to_bf16(values: torch.Tensor, random: torch.Tensor | int) -> torch.Tensor:
    """Round (n,) fp32 to bf16 with 16 random bits each."""
    rounded = (_bits(values) + random) >> 16
    rounded = torch.where(values == values, rounded, 0x7FC0)
    return rounded.to(torch.int16).view(torch.bfloat16)


def shared_exponents(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the exponent of each block of ``counts`` consecutive values, (num_blocks,) uint8: so
    that rounding up does not lead past the largest code."""
    largest = torch.segment_reduce(
        values.abs(), "max", lengths=counts, unsafe=True, initial=0.0
    )  # 0 for a block without values
    exponents = (_bits(largest) + (1 << _DROPPED) - 1) >> 23
    return exponents.clamp_(LOWEST_EXPONENT, _HIGHEST_EXPONENT).to(torch.uint8)


def to_codes(
    values: torch.Tensor,  # (n,) fp32
    exponents: torch.Tensor,  # (n,) integers, of their blocks
    random: torch.Tensor | int,  # (n,) 16 random bits each
    *,
    signed: bool,
) -> torch.Tensor:
    """Return the codes of 8-bit moments, (n,) uint8. A number that is not 0 and has no sign does
    not become 0, since it is divided by."""
    top = 15 if signed else 31
    shared = exponents.to(torch.int64)
    bits = _bits(values)
    size = bits & 0x7FFFFFFF
    normal = ((size + random * 16) >> _DROPPED) - ((shared - top) << _MANTISSA)
    small = _float(size) * _float((256 + top - shared) << 23)  # in units of the smallest step
    fraction = torch.as_tensor(random, device=values.device).to(torch.float32) * 2.0**-16
    small = (small.clamp_(max=8.0) + fraction).to(torch.int64)
    code = torch.where(size >> 23 >= shared - top + 1, normal, small).clamp_(max=8 * top + 7)
    if signed:
        return (code | (bits >> 31 << 7)).to(torch.uint8)
    return torch.where((code == 0) & (size != 0), 1, code).to(torch.uint8)


def from_codes(codes: torch.Tensor, exponents: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Return the numbers of 8-bit codes, (n,) fp32; ``exponents``: (n,) of their blocks."""
    top = 15 if signed else 31
    code = codes.to(torch.int64)
    size = code & 0x7F if signed else code
    exponent = size >> _MANTISSA
    mantissa = (size & 7) + torch.where(exponent > 0, 8, 0)
    step = (exponents.to(torch.int64) - top - 2 + (exponent - 1).clamp_(min=0)) << 23
    values = mantissa.to(torch.float32) * _float(step)
    return torch.where(code >> 7 == 1, -values, values) if signed else values


def split(values: torch.Tensor) -> torch.Tensor:
    """Return the lower bits of fp32 master weights whose bf16 weights are their nearest ones, (n,)
    int16."""
    bits = _bits(values)
    low = bits & 0xFFFF
    return torch.where(low == 0x8000, 0x7FFF + 2 * (bits >> 16 & 1), low).to(torch.int16)


def join(weights: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return the fp32 master weights of (n,) bf16 weights and their lower bits, int16."""
    high = weights.view(torch.int16).to(torch.int64)
    bits = low.to(torch.int64) & 0xFFFF
    return _float(((high - (bits >> 15)) << 16 | bits) & _32)
