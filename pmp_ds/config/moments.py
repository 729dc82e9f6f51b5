"""The formats of the optimizer's moments, each with everything that differs between them.

A new one is a ``MomentFormat`` in ``MOMENTS``. Nothing here imports torch before a dtype is asked
for.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pmp_ds.config.train import TrainConfig

BLOCK = 1024
"""Elements of a tensor, kept or not, whose 8-bit moments share an exponent."""


@dataclass(frozen=True)
class MomentFormat:
    """One value of ``train.moments``."""

    name: str
    torch_name: str
    """The dtype of one moment in memory."""

    number: int
    """In the operators."""

    has_exponents: bool = False
    """Whether the moments of each block share an exponent, one byte."""

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of one moment in memory."""
        import torch

        found: torch.dtype = getattr(torch, self.torch_name)
        return found

    def num_bytes(self, kept: int, elements: int) -> int:
        """Return the bytes of one moment of ``kept`` out of so many elements."""
        return kept * self.dtype.itemsize + (-(-elements // BLOCK) if self.has_exponents else 0)


_ALL = (
    MomentFormat("fp32", "float32", 1),
    MomentFormat("bf16", "bfloat16", 2),
    MomentFormat("int8", "uint8", 3, has_exponents=True),
)
MOMENTS: dict[str, MomentFormat] = {one.name: one for one in _ALL}
FP32 = MOMENTS["fp32"]


def moments_of(train: "TrainConfig") -> MomentFormat:
    """Return the format named by ``train.moments``."""
    return MOMENTS[train.moments]
