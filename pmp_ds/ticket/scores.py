"""What top-k ranks: |g| of one update, or its running mean (paper, Eq. 2, and its steady kin).

Works on the gradient shards that a rank owns, in place. Only the order of scores matters, so the
running mean is kept as a running sum and the exponential mean without bias correction.
"""

from collections.abc import Sequence
from typing import Literal

import torch

ScoreKind = Literal["mean", "ema", "gradient"]


class Scores:
    """Running scores of the local fragments: 4 bytes per local element, none for `gradient`."""

    def __init__(self, kind: ScoreKind, decay: float = 0.95) -> None:
        self.kind = kind
        self.decay = decay
        self.values: list[torch.Tensor] | None = None

    def update(self, gradients: Sequence[torch.Tensor], scale: float = 1.0) -> list[torch.Tensor]:
        """Take in one update's reduced gradients and return what to rank.

        ``gradients``: (n_i,) each, any float dtype, times ``scale`` (the loss scale of fp16). The
        result is ranked by magnitude, so for `gradient` it is the gradients themselves: no copy.
        """
        if self.kind == "gradient":
            return list(gradients)
        if self.values is None:
            self.values = [torch.zeros_like(g, dtype=torch.float32) for g in gradients]
        for value, gradient in zip(self.values, gradients, strict=True):
            if self.kind == "mean":
                value.add_(gradient.abs(), alpha=1.0 / scale)
            else:
                value.mul_(self.decay).add_(gradient.abs(), alpha=(1.0 - self.decay) / scale)
        return self.values
