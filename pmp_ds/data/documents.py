"""The starts of documents inside packed blocks."""

import torch


def document_positions(
    input_ids: torch.Tensor,  # (B, T) int64
    eos_id: int,
) -> torch.Tensor:
    """Return each token's position in its document, (B, T) int64: 0 at the start of a block and
    after every end-of-text token."""
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == eos_id
    return place - place.where(begins, 0).cummax(dim=1).values
