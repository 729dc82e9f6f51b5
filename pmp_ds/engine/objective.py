"""What a model is trained to do: from a batch to the loss of each of its samples."""

from typing import Any, Protocol

import torch

from pmp_ds.data.documents import document_positions
from pmp_ds.model.next_token import token_losses


class Objective(Protocol):
    """How the rows of a batch are read, (B, T) int64."""

    def logits(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        """The model's output for a batch, (B, ...)."""
        ...

    def losses(self, logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """The loss of each sample, (B,) fp32."""
        ...


class NextToken:
    """Rows are blocks of tokens; the loss is the mean cross-entropy of the next token in nats,
    labels equal inputs. With ``separator_id`` documents are kept apart that end with this token,
    and the mean is over the tokens that follow another of their document."""

    def __init__(self, separator_id: int | None = None) -> None:
        self._separator_id = separator_id

    def logits(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        options = {}
        if self._separator_id is not None:  # `transformers` keeps apart what starts at position 0
            options["position_ids"] = document_positions(batch, self._separator_id)
        logits: torch.Tensor = model(input_ids=batch, use_cache=False, **options).logits
        return logits

    def losses(self, logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        losses = token_losses(logits, batch)
        if self._separator_id is None:
            return losses.mean(dim=1)
        counted = batch[:, :-1] != self._separator_id
        counted |= ~counted.any(dim=1, keepdim=True)  # nothing but separators is no loss of 0
        return losses.where(counted, 0.0).sum(dim=1) / counted.sum(dim=1)
