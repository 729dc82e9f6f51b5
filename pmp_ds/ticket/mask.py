"""Parameter masks as packed bits: one bit per element, row-major, bit i of byte j is element 8j+i.

True means kept: in the ticket, trained. A mask of 1.1 billion elements is 137 MB, in memory or in a
file that is read where it is needed (stored_bits.py).
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pmp_ds.errors import UserError

MOST_ELEMENTS = 1 << 48  # in a model, and per dimension
_MOST_DIMENSIONS = 16
_LONGEST_NAME = 1000
_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack(param_mask: torch.Tensor) -> torch.Tensor:
    """Pack (n,) bool into (ceil(n / 8),) uint8; bits after the last element are 0."""
    param_mask = param_mask.reshape(-1)
    num_bytes = (param_mask.numel() + 7) // 8
    padded = torch.zeros(num_bytes * 8, dtype=torch.uint8, device=param_mask.device)
    padded[: param_mask.numel()] = param_mask
    weighed = padded.view(num_bytes, 8).mul_(_bits(param_mask.device))
    return weighed.sum(dim=1, dtype=torch.uint8)


def unpack(bits: torch.Tensor, numel: int, start: int = 0) -> torch.Tensor:
    """Unpack ``numel`` elements from ``start`` on: (ceil(n / 8),) uint8 to (numel,) bool."""
    first, last = start // 8, (start + numel + 7) // 8
    weights = _bits(bits.device)
    dense = (bits[first:last, None] & weights).ne_(0).to(torch.bool).view(-1)
    return dense[start - 8 * first : start - 8 * first + numel]


def full_bits(numel: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the packed mask that keeps all ``numel`` elements."""
    bits = torch.full(((numel + 7) // 8,), 255, dtype=torch.uint8, device=device)
    if numel % 8:
        bits[-1] = (1 << numel % 8) - 1
    return bits


def popcount(bits: torch.Tensor) -> int:
    """Number of ones."""
    return int(np.bitwise_count(bits.cpu().numpy()).sum(dtype=np.int64))


def num_ones(bits: torch.Tensor) -> torch.Tensor:
    """Number of ones, () int64, without waiting for the device."""
    return _ones_of_bytes(bits.device)[bits.int()].sum(dtype=torch.int64)


def count_common(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Number of elements that are kept in both packed masks, () int64, without waiting."""
    return num_ones(a & b)


@functools.cache
def _bits(device: torch.device) -> torch.Tensor:
    """Made once: a copy to a GPU waits."""
    return torch.tensor(_BITS, dtype=torch.uint8, device=device)


@functools.cache
def _ones_of_bytes(device: torch.device) -> torch.Tensor:
    counts = [byte.bit_count() for byte in range(256)]
    return torch.tensor(counts, dtype=torch.uint8, device=device)


def iou(num_common: int, num_kept: int) -> float:
    """Return intersection over union of two masks of ``num_kept`` ones each (paper, Eq. 3)."""
    return num_common / (2 * num_kept - num_common)


def check_bits(bits: torch.Tensor, numel: int, what: str) -> None:
    """Raise UserError, starting with ``what``, unless ``bits`` are a packed mask of ``numel``
    elements: uint8, one dimension, no longer than needed, 0 after the last element."""
    _check_form(bits.dtype, tuple(bits.shape), numel, what)
    _check_end(bits[-1:], numel, what)


def _check_form(dtype: torch.dtype | str, shape: tuple[int, ...], numel: int, what: str) -> None:
    length = (numel + 7) // 8
    if dtype != torch.uint8 or shape != (length,):
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{what} is {kind} of shape {list(shape)}, but {numel} elements need uint8 of shape "
            f"[{length}]"
        )


def _check_end(last: torch.Tensor, numel: int, what: str) -> None:
    if numel % 8 and int(last) >> numel % 8:
        raise UserError(f"{what} has ones after the last of its {numel} elements")


def check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless ``shapes`` fit a model's parameters and their names are printable."""
    total = 0
    for name, shape in shapes.items():
        if not (name.isprintable() and len(name) <= _LONGEST_NAME):
            raise UserError(f"{name!r:.80} is not a parameter's name")
        if not _is_shape(shape):
            raise UserError(f"the shape of {name!r} is {shape!r:.80}: sizes from 0 are needed")
        total += math.prod(shape)
        if total > MOST_ELEMENTS:
            raise UserError(f"the mask has more than {MOST_ELEMENTS:,} elements")


def _is_shape(shape: object) -> bool:
    return (
        isinstance(shape, tuple)
        and len(shape) <= _MOST_DIMENSIONS
        and all(type(size) is int and 0 <= size <= MOST_ELEMENTS for size in shape)
    )


class Bits(Mapping[str, torch.Tensor], ABC):
    """The packed bits of parameters by name, which need not be in memory."""

    @abstractmethod
    def form(self, name: str) -> tuple[torch.dtype | str, tuple[int, ...]]:
        """Return dtype and shape of a parameter's bits."""

    @abstractmethod
    def part(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return bytes [first, last) of a parameter's bits, (last - first,) uint8."""

    @abstractmethod
    def num_ones(self, name: str, last: int) -> int:
        """Return the number of ones in the first ``last`` bytes of a parameter's bits."""

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a parameter's bits in order, not all at once where they are in a file."""
        yield self[name]


class HeldBits(dict[str, torch.Tensor], Bits):
    """Packed bits in memory, on CPU."""

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self[name].dtype, tuple(self[name].shape)

    def part(self, name: str, first: int, last: int) -> torch.Tensor:
        return self[name][first:last]

    def num_ones(self, name: str, last: int) -> int:
        return popcount(self[name][:last])


@dataclass(frozen=True)
class ParamMask:
    """The mask of a whole model: packed bits by parameter name.

    ``bits`` in memory are kept in the order of ``shapes``, whatever the order in a file. Raises
    UserError that names the parameter when bits do not fit its shape.
    """

    bits: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        for name in sorted(self.bits.keys() ^ self.shapes.keys()):
            lacks = "bits" if name in self.shapes else "a shape"
            raise UserError(f"the mask of {name!r} lacks {lacks}")
        check_shapes(self.shapes)
        if not isinstance(self.bits, Bits):
            held = HeldBits({name: self.bits[name] for name in self.shapes})
            object.__setattr__(self, "bits", held)
        for name, shape in self.shapes.items():
            numel, what = math.prod(shape), f"the mask of {name!r}"
            _check_form(*self._bits.form(name), numel, what)
            _check_end(self._bits.part(name, max(0, numel - 1) // 8, (numel + 7) // 8), numel, what)

    @property
    def _bits(self) -> Bits:
        assert isinstance(self.bits, Bits)
        return self.bits

    def numel(self, name: str) -> int:
        return int(torch.Size(self.shapes[name]).numel())

    def fragment(self, name: str, start: int, numel: int) -> torch.Tensor:
        """Return elements [start, start + numel) of parameter ``name``, (numel,) bool."""
        first = start // 8
        packed = self._bits.part(name, first, (start + numel + 7) // 8)
        return unpack(packed, numel, start - 8 * first)

    def full(self, name: str) -> torch.Tensor:
        """Return the mask of one parameter as bool, in its shape."""
        return self.fragment(name, 0, self.numel(name)).view(self.shapes[name])

    def num_kept_before(self, name: str, start: int) -> int:
        """Return the number of ones among the first ``start`` elements of parameter ``name``."""
        whole = start // 8
        return self._bits.num_ones(name, whole) + int(
            self.fragment(name, 8 * whole, start - 8 * whole).sum()
        )

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a parameter's packed bits in order, (n,) uint8 each."""
        return self._bits.pieces(name)

    @property
    def num_kept(self) -> int:
        return sum(self._bits.num_ones(name, (self.numel(name) + 7) // 8) for name in self.shapes)

    @property
    def num_params(self) -> int:
        return sum(self.numel(name) for name in self.shapes)

    def __repr__(self) -> str:  # without the content: a mask in a log is a leaked mask
        return f"ParamMask({self.num_params} elements)"
