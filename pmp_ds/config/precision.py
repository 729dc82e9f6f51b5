"""The precisions of weights, each with everything that differs between them.

A new one is a ``Precision`` in ``PRECISIONS``. Nothing here imports torch before a dtype is asked
for.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pmp_ds.config.train import TrainConfig


@dataclass(frozen=True)
class Precision:
    """One value of ``train.precision``."""

    name: str
    torch_name: str
    """The dtype of the weights in forward and backward passes, as in config.json: `bfloat16`."""

    scales_loss: bool = False
    """Whether the loss scale is dynamic; non-finite gradients then normally skip the update."""

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of the weights in forward and backward passes."""
        import torch

        found: torch.dtype = getattr(torch, self.torch_name)
        return found

    @property
    def has_master(self) -> bool:
        """Whether the optimizer updates an fp32 copy of the weights, which are rounded from it."""
        return self.torch_name != "float32"

    @property
    def num_bytes(self) -> int:
        """The bytes of one weight."""
        return self.dtype.itemsize

    @property
    def section(self) -> str | None:
        """The section of the DeepSpeed JSON that enables it; None for fp32."""
        return self.name if self.has_master else None


_ALL = (
    Precision("fp32", "float32"),
    Precision("bf16", "bfloat16"),
    Precision("fp16", "float16", scales_loss=True),
)
PRECISIONS: dict[str, Precision] = {one.name: one for one in _ALL}


def precision_of(train: "TrainConfig") -> Precision:
    """Return the precision named by ``train.precision``."""
    return PRECISIONS[train.precision]
