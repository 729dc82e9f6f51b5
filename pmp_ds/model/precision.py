"""The precisions of weights, each with everything that differs between them."""

from dataclasses import dataclass

import torch

from pmp_ds import config


@dataclass(frozen=True)
class Precision:
    """One value of ``train.precision``."""

    name: config.Precision
    dtype: torch.dtype
    """The dtype of the weights in forward and backward passes."""

    scales_loss: bool = False
    """Whether the loss scale is dynamic; non-finite gradients then normally skip the update."""

    @property
    def has_master(self) -> bool:
        """Whether the optimizer updates an fp32 copy, from which the weights are rounded."""
        return self.dtype != torch.float32

    @property
    def num_bytes(self) -> int:
        """The bytes of one weight."""
        return self.dtype.itemsize

    @property
    def torch_name(self) -> str:
        """The name in config.json, such as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def section(self) -> str | None:
        """The section of the DeepSpeed JSON that enables it; None for fp32."""
        return self.name if self.has_master else None


_ALL = (
    Precision("fp32", torch.float32),
    Precision("bf16", torch.bfloat16),
    Precision("fp16", torch.float16, scales_loss=True),
)
PRECISIONS = {one.name: one for one in _ALL}


def precision_of(train: config.TrainConfig) -> Precision:
    """Return the precision named by ``train.precision``."""
    return PRECISIONS[train.precision]
