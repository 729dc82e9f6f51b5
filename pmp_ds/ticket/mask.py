"""Parameter masks as packed bits: one bit per element, row-major, bit i of byte j is element 8j+i.

True means kept: in the ticket, trained. A mask of 1.1 billion elements is 137 MB.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)
_POPCOUNT = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


def pack(param_mask: torch.Tensor) -> torch.Tensor:
    """(n,) bool to (ceil(n / 8),) uint8; the bits after the last element are 0."""
    param_mask = param_mask.reshape(-1)
    num_bytes = (param_mask.numel() + 7) // 8
    padded = param_mask.new_zeros(num_bytes * 8)
    padded[: param_mask.numel()] = param_mask
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=param_mask.device)
    return (padded.view(num_bytes, 8).to(torch.uint8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack(bits: torch.Tensor, numel: int, start: int = 0) -> torch.Tensor:
    """(ceil(n / 8),) uint8 to (numel,) bool: the elements from ``start`` on."""
    first, last = start // 8, (start + numel + 7) // 8
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=bits.device)
    dense = (bits[first:last, None] & weights).ne_(0).to(torch.bool).view(-1)
    return dense[start - 8 * first : start - 8 * first + numel]


def full_bits(numel: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The packed mask that keeps all of ``numel`` elements."""
    bits = torch.full(((numel + 7) // 8,), 255, dtype=torch.uint8, device=device)
    if numel % 8:
        bits[-1] = (1 << numel % 8) - 1
    return bits


def popcount(bits: torch.Tensor) -> int:
    """Number of ones."""
    return int(_POPCOUNT.to(bits.device)[bits.int()].sum(dtype=torch.int64))


def count_common(a: torch.Tensor, b: torch.Tensor) -> int:
    """Number of elements that are kept in both packed masks."""
    return popcount(a & b)


def iou(num_common: int, num_kept: int) -> float:
    """Intersection over union of two masks of ``num_kept`` ones each (paper, Eq. 3)."""
    return num_common / (2 * num_kept - num_common)


@dataclass(frozen=True)
class ParamMask:
    """The mask of a whole model: packed bits by parameter name, on CPU."""

    bits: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]

    def numel(self, name: str) -> int:
        return int(torch.Size(self.shapes[name]).numel())

    def fragment(self, name: str, start: int, numel: int) -> torch.Tensor:
        """(numel,) bool: elements [start, start + numel) of parameter ``name``, row-major."""
        return unpack(self.bits[name], numel, start)

    def full(self, name: str) -> torch.Tensor:
        """The mask of one parameter as bool, in its shape."""
        return unpack(self.bits[name], self.numel(name)).view(self.shapes[name])

    def num_kept_before(self, name: str, start: int) -> int:
        """Ones among the first ``start`` elements of parameter ``name``."""
        whole = start // 8
        return popcount(self.bits[name][:whole]) + int(
            self.fragment(name, 8 * whole, start - 8 * whole).sum()
        )

    @property
    def num_kept(self) -> int:
        return sum(popcount(bits) for bits in self.bits.values())

    @property
    def num_params(self) -> int:
        return sum(self.numel(name) for name in self.shapes)

    def __repr__(self) -> str:  # never the content: a mask in a log is a leaked mask
        return f"ParamMask({self.num_params} elements)"
