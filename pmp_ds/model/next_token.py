"""The next-token loss, shared by training, evaluation, attacks and derivatives."""

import torch
from torch.nn import functional

_NONE = -100  # no token


def token_losses(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Return -log p in nats of each token except the first, (B, T - 1) fp32, from logits (B, T, V)
    in any precision and tokens (B, T) int64."""
    # The last position has no next token. To cut it off would copy the logits and their gradient.
    tokens = functional.pad(input_ids[:, 1:], (0, 1), value=_NONE)
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens.flatten(), ignore_index=_NONE, reduction="none"
    )
    return losses.view_as(tokens)[:, :-1].contiguous()
