"""The next-token loss, shared by training, evaluation, attacks and derivatives."""

import torch


def token_losses(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Return -log p in nats of each token except the first, (B, T - 1) fp32, from logits (B, T, V)
    in any precision and tokens (B, T) int64."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none"
    ).view(input_ids.shape[0], -1)
