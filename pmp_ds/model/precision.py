"""The precisions that weights may have, each with all that differs between them."""

from dataclasses import dataclass

import torch

from pmp_ds import config


@dataclass(frozen=True)
class Precision:
    """One value of ``train.precision``."""

    name: config.Precision
    dtype: torch.dtype
    """Of the weights in forward and backward."""

    scales_loss: bool = False
    """With a dynamic scale: gradients that are not finite are normal then, and skip the update."""

    @property
    def has_master(self) -> bool:
        """Whether the optimizer updates an fp32 copy of the weights, which are rounded from it."""
        return self.dtype != torch.float32

    @property
    def num_bytes(self) -> int:
        """Of one weight."""
        return self.dtype.itemsize

    @property
    def torch_name(self) -> str:
        """As config.json spells it: `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def section(self) -> str | None:
        """The section of the DeepSpeed JSON that switches it on; fp32 has none."""
        return self.name if self.has_master else None


_ALL = (
    Precision("fp32", torch.float32),
    Precision("bf16", torch.bfloat16),
    Precision("fp16", torch.float16, scales_loss=True),
)
PRECISIONS = {one.name: one for one in _ALL}


def precision_of(train: config.TrainConfig) -> Precision:
    """Return the object that ``train.precision`` names."""
    return PRECISIONS[train.precision]
