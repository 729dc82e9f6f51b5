"""Numbers in fewer bits against arithmetic on Python's integers and fractions."""

import math
import struct
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from pmp_ds.engine.memory import Meter
from pmp_ds.optim.low_bit import (
    NEAREST,
    from_codes,
    join,
    key_of,
    random_bits,
    shared_exponents,
    split,
    stream_of,
    to_bf16,
    to_codes,
)
from pmp_ds.optim.stored import CHUNK, kept_master

SIGNED = pytest.mark.parametrize("signed", [True, False])


def values(n: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """(n,) fp32 over many magnitudes, some 0."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(n, generator=generator)
    numbers *= 10 ** (spread * torch.randn(n, generator=generator))
    numbers[::17] = 0.0
    return numbers


def test_a_split_master_is_made_by_chunks():
    """The same bits as at once, and never the 64-bit numbers of more than a chunk."""
    numbers = values(3 * CHUNK + 5)
    with Meter(numbers.device) as meter:
        held = []
        peak = meter.peak_of(lambda: held.append(kept_master(numbers, None, "split")["master_low"]))
    assert torch.equal(held[0], split(numbers))
    assert peak < 4 * (2 * 4 + 2 + 2) * CHUNK + 40 * CHUNK


def grid(shared: int, *, signed: bool) -> Iterator[Fraction]:
    """The sizes that the codes of a block stand for, ascending, as the format is described: 3 bits
    of mantissa; the top exponent is the shared one; the lowest binade is continued down to 0."""
    top = 15 if signed else 31
    for exponent in range(top + 1):
        unit = Fraction(2) ** (shared - 127 - top + max(exponent, 1) - 3)
        for mantissa in range(8):
            yield unit * (mantissa + (8 if exponent else 0))


@SIGNED
@pytest.mark.parametrize("shared", [40, 41, 127, 254])
def test_every_code(signed, shared):
    codes = torch.arange(128 if signed else 256).to(torch.uint8)
    exponents = torch.full(codes.shape, shared)
    found = from_codes(codes, exponents, signed=signed).tolist()
    assert [Fraction(value) for value in found] == list(grid(shared, signed=signed))
    if signed:
        negative = from_codes(codes | 128, exponents, signed=True)
        assert negative.tolist() == [-value for value in found]
        assert math.copysign(1.0, float(negative[0])) == -1.0
    exact = torch.tensor(found).bfloat16().float()
    assert exact.tolist() == found, "a checkpoint stores them in bf16"


@SIGNED
@pytest.mark.parametrize("random", [0, 1, NEAREST, 0xFFFF])
def test_rounds_to_a_neighbour(signed, random):
    """Up if the distance from the lower one, in units of the gap, and the random bits reach 1."""
    numbers = values(300) if signed else values(300).abs()
    shared = shared_exponents(numbers, torch.tensor([300]))
    places = list(grid(int(shared), signed=signed))
    each = shared.repeat(300)
    found = from_codes(to_codes(numbers, each, random, signed=signed), each, signed=signed)
    for number, value in zip(numbers.tolist(), found.tolist(), strict=True):
        size = Fraction(abs(number))
        below = max(i for i, place in enumerate(places) if place <= size)
        assert below + 1 < len(places) or size == places[below], "the largest code is not passed"
        gap = places[min(below + 1, len(places) - 1)] - places[below]
        rest = (size - places[below]) / gap if gap else Fraction(0)
        step = Fraction(1, 2**14)  # both sums are cut off a little below a step of the random bits
        up = rest + Fraction(random, 1 << 16)
        allowed = {places[below + int(up + slack >= 1)] for slack in (-step, Fraction(0), step)}
        if not signed and size:
            allowed = {max(place, places[1]) for place in allowed}
        assert Fraction(abs(value)) in allowed, number
        assert value == 0.0 or (value < 0) == (number < 0)


@SIGNED
def test_random_rounding_has_no_bias(signed):
    n = 200_000
    random = random_bits(torch.arange(n), key_of(stream_of("x"), 1))[0 if signed else 1]
    for number in (1.03, 0.0251, 1.9e-4):
        numbers = torch.full((n,), number)
        numbers[0] = 1.99
        shared = shared_exponents(numbers, torch.tensor([n])).repeat(n)
        codes = to_codes(numbers, shared, random, signed=signed)
        mean = from_codes(codes, shared, signed=signed)[1:].double().mean()
        assert float(mean) == pytest.approx(number, rel=1e-3)
        assert float(to_bf16(numbers, random)[1:].double().mean()) == pytest.approx(
            number, rel=1e-4
        )


@SIGNED
def test_codes_survive_a_checkpoint(signed):
    """Values that came from codes, in bf16 and back to the nearest: the same values."""
    numbers = values(4096, 1, 1.0) if signed else values(4096, 1, 1.0).abs()
    counts = torch.tensor([1024] * 4)
    random = random_bits(torch.arange(4096), (1, 2))[0]
    shared = shared_exponents(numbers, counts).repeat_interleave(counts)
    stored = from_codes(to_codes(numbers, shared, random, signed=signed), shared, signed=signed)
    again = shared_exponents(stored.bfloat16().float(), counts).repeat_interleave(counts)
    codes = to_codes(stored, again, NEAREST, signed=signed)
    assert torch.equal(from_codes(codes, again, signed=signed), stored)


def test_shared_exponents_by_hand():
    """Of 1.875, the largest mantissa, and of what is above it; a block of zeros; an empty one."""
    numbers = torch.tensor([1.875, -0.5, 1.8750001, 0.0, 0.0, 2.0**-120])
    counts = torch.tensor([2, 1, 2, 0, 1])
    assert shared_exponents(numbers, counts).tolist() == [127, 128, 40, 40, 40]


def test_a_second_moment_does_not_vanish():
    numbers = torch.tensor([1.0, 1e-20, 1e-30, 0.0])
    shared = shared_exponents(numbers, torch.tensor([4])).repeat(4)
    assert (
        from_codes(to_codes(numbers, shared, 0, signed=False), shared, signed=False) > 0
    ).tolist() == [True, True, True, False]


def test_bf16_by_hand():
    """Between 1 and the next bf16 number a quarter of the way: up from three quarters on."""
    number = torch.tensor([1.0 + 2.0**-9, -1.0 - 2.0**-9, torch.nan])
    assert to_bf16(number, 0xBFFF)[:2].tolist() == [1.0, -1.0]
    assert to_bf16(number, 0xC000)[:2].tolist() == [1.0078125, -1.0078125]
    assert bool(to_bf16(number, 0xC000)[2].isnan())


def test_split_is_exact():
    """But halfway between two weights, where the master moves by one unit in the last place; the
    weight is the nearest of the master before and after."""
    master = values(100_000)
    bits = master.view(torch.int32)
    bits[:2000] = bits[:2000] & -65536 | 0x8000
    bits[2000:3000] = bits[2000:3000] & -65536 | 0x8001
    bits[3000:4000] = bits[3000:4000] & -65536 | 0x7FFF
    weights = master.bfloat16()
    found = join(weights, split(master))
    halfway = (bits & 0xFFFF) == 0x8000
    assert int(halfway.sum()) >= 2000
    assert torch.equal(found[~halfway], master[~halfway])
    moved = found[halfway].view(torch.int32) - bits[halfway]
    assert set(moved.tolist()) == {-1, 1}
    assert torch.equal(found.bfloat16(), weights)
    assert torch.equal(join(weights, split(found)), found)


def test_split_at_the_ends():
    """Infinity, NaN, the largest number, which rounds to infinity, and the smallest."""
    largest = struct.unpack("f", struct.pack("I", 0x7F7FFFFF))[0]
    master = torch.tensor([torch.inf, -torch.inf, largest, -largest, 1e-45, -1e-45, -0.0])
    found = join(master.bfloat16(), split(master))
    assert torch.equal(found.view(torch.int32), master.view(torch.int32))
    nan = torch.tensor([torch.nan])
    assert bool(join(nan.bfloat16(), split(nan)).isnan())


def test_random_bits_depend_on_place_update_and_name():
    places = torch.tensor([0, 1, 2**32, 2**32 + 1, 2**33])
    found = {
        tuple(torch.stack(random_bits(places, key_of(stream_of(name), update))).view(-1).tolist())
        for name, update in (("a", 1), ("a", 2), ("b", 1))
    }
    assert len(found) == 3
    assert all(len(set(words)) == 10 for words in found)
    assert key_of(0, 1) == (0x7B1DCDAF, 0xE220A839)  # the first output of splitmix64 from 0


def test_random_bits_are_even():
    """Each of the 32 bits is 1 half of the time, and no two of them agree more often than that."""
    first, second = random_bits(torch.arange(1 << 16), key_of(7, 3))
    words = first | second << 16
    bits = torch.stack([words >> i & 1 for i in range(32)]).double() * 2 - 1
    correlation = bits @ bits.T / bits.shape[1]
    correlation.fill_diagonal_(0.0)
    assert float(bits.mean(dim=1).abs().max()) < 0.02
    assert float(correlation.abs().max()) < 0.02
