"""Find fp32 weights of which a part was once rounded: the low bits of such numbers are zero."""

import math
from collections.abc import Iterator

import torch

FP16_BITS = 13
"""Low bits of an fp32 number that fp16 lacks."""

BF16_BITS = 16
"""Low bits of an fp32 number that bf16 lacks."""


class Rounded:
    """Counts the numbers of matrices that end in ``low_bits`` bits of zero. Vectors are left out,
    because norms begin as ones, and so are zeros, which need no rounding."""

    def __init__(self, low_bits: int) -> None:
        self._low_bits = low_bits
        self._counts: list[tuple[int, int]] = []

    def add(self, values: torch.Tensor) -> None:
        """Count one parameter, fp32 of any shape."""
        if values.ndim > 1:
            rounded = low_zeros(values, self._low_bits) & (values != 0)
            self._counts.append((int(rounded.sum()), int(values.count_nonzero())))

    @property
    def found(self) -> bool:
        """Whether more numbers than by chance were rounded, in one matrix or in all together."""
        return any(rounded > self._most(numbers) for rounded, numbers in self._each())

    @property
    def found_part(self) -> bool:
        """Whether, in one matrix or in all together, more than by chance were, but not all."""
        each = self._each()
        return any(self._most(numbers) < rounded < numbers for rounded, numbers in each)

    def _each(self) -> Iterator[tuple[int, int]]:  # (rounded, numbers)
        yield from self._counts
        yield sum(rounded for rounded, _ in self._counts), sum(n for _, n in self._counts)

    def _most(self, numbers: int) -> float:
        """Return what chance does not exceed: 8 standard deviations above the mean. Twice the mean,
        because torch's own normals end in zeros 1.3 times as often as they should (measured)."""
        mean = 2.0 * numbers * 2.0**-self._low_bits
        return mean + 8.0 * math.sqrt(mean) + 1.0


def low_zeros(values: torch.Tensor, low_bits: int) -> torch.Tensor:
    """Return which fp32 ``values`` end in ``low_bits`` bits of zero, (same shape) bool."""
    return (values.view(torch.int32) & ((1 << low_bits) - 1)) == 0
