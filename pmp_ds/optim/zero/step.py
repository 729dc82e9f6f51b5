"""The update of a DeepSpeed engine as one pass over the ticket.

DeepSpeed's own ``step`` converts the gradients to fp32, reads them three times to look for
overflow, measure and clip them, updates dense fp32 weights and copies them back. Here the norm of
the ticket's gradients is one read of them as they were reduced, and one launch unscales, clips,
decays, updates moments and master weights and rounds the model's own; the complement is not
touched. The gathering of the weights over the ranks stays DeepSpeed's.
"""

import math
from typing import Any

import torch

from pmp_ds.optim.masked import MaskedOptimizer
from pmp_ds.optim.zero.shards import ZeroShards

_EPSILON = 1e-6  # that DeepSpeed adds to the norm before it divides


class MaskedStep:
    """Stands for the ``step`` of DeepSpeed's optimizer. The host waits for the device in fp16
    alone, whose loss scale it keeps."""

    skipping = False
    """Whether the next update only drops its gradients."""

    def __init__(self, optimizer: MaskedOptimizer, shards: ZeroShards) -> None:
        self._optimizer, self._shards = optimizer, shards

    def __call__(self, closure: Any = None) -> None:
        shards = self._shards
        shards.before_step()
        if self.skipping:
            shards.discard()
            return
        scale = shards.loss_scale
        update = self._optimizer.update(shards.gradients(), shards.weights())
        norm = shards.norm(update.squares())  # of gradients that are still scaled
        overflow = shards.scales_loss and not bool(norm.isfinite())
        shards.count(overflow, norm / scale)
        if overflow:
            shards.discard()
            return
        update.make(clipping_factor(norm, scale, shards.clip_norm))
        del update  # it holds the gradients
        shards.after_step()


def clipping_factor(norm: torch.Tensor, scale: float, clip_norm: float) -> torch.Tensor:
    """Return what gradients of this norm are multiplied by, () fp32: unscaled, and clipped to
    ``clip_norm`` unless that is 0. NaN if the norm is not finite, so that nothing is updated."""
    combined = torch.full_like(norm, scale)
    if clip_norm > 0.0:
        combined = ((norm / scale + _EPSILON) / clip_norm).clamp(min=1.0) * scale
    return torch.where(norm.isfinite(), 1.0 / combined, math.nan).float()
