"""Training objectives: from a batch to the loss of each sample."""

from typing import Any, Protocol

import torch
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

from pmp_ds.data.documents import document_positions
from pmp_ds.model.next_token import token_losses

_NONE = -100  # no token


class Objective(Protocol):
    """How to read the rows of a batch, (B, T) int64."""

    def logits(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        """Return the model's output for a batch, (B, ...)."""
        ...

    def losses(self, logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Return the loss of each sample, (B,) fp32."""
        ...


def in_blocks(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Return what ``token_losses`` does, without the logits in fp32, whole: by DeepSpeed's Triton
    kernels on a GPU, elsewhere by blocks of rows. Last bits differ."""
    # The last position has no next token. To cut it off would copy the logits and their gradient.
    tokens = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=_NONE)
    losses = chunked_cross_entropy(logits.flatten(0, 1), tokens.flatten(), _NONE, "none")
    return losses.view_as(tokens)[:, :-1]


class NextToken:
    """Next-token prediction on blocks of tokens: mean cross-entropy in nats, labels equal inputs.

    ``separator_id`` ends each document. With it, documents are kept separate, and the mean covers
    only tokens that follow another token of the same document.
    """

    def __init__(self, separator_id: int | None = None) -> None:
        self._separator_id = separator_id

    def logits(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        options = {}
        if self._separator_id is not None:  # `transformers` starts a document at each position 0
            options["position_ids"] = document_positions(batch, self._separator_id)
        logits: torch.Tensor = model(input_ids=batch, use_cache=False, **options).logits
        return logits

    def losses(self, logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        of_device = in_blocks if logits.device.type == "cuda" else token_losses
        losses = of_device(logits, batch)
        if self._separator_id is None:
            return losses.mean(dim=1)
        counted = batch[:, :-1] != self._separator_id
        counted |= ~counted.any(dim=1, keepdim=True)  # a row of separators alone has a loss too
        return losses.where(counted, 0.0).sum(dim=1) / counted.sum(dim=1)
