"""The size of a finished model's gradients inside and outside the ticket (the paper's Figure 6).

|g| of the mean loss over some held-out blocks is counted per parameter element, in bins of log10.
The results are sums over the whole ticket and reveal nothing about a single tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pmp_ds.errors import UserError
from pmp_ds.evaluate.perplexity import token_losses
from pmp_ds.model.parameters import trainable
from pmp_ds.ticket.mask import ParamMask

LOWEST, HIGHEST, PER_DECADE = -12, 2, 4
EDGES_LOG10 = tuple(LOWEST + i / PER_DECADE for i in range((HIGHEST - LOWEST) * PER_DECADE + 1))
"""Smaller and larger magnitudes count in the first and the last bin."""

_FINE = 1 << 16  # bins by the upper 16 bits after the sign, 0.4% wide


def accumulate(
    model: Any,
    blocks: torch.Tensor,  # (n, T) int64
    batch_size: int,
    tick: Callable[[int], None] = lambda count: None,
) -> None:
    """Leave the gradient of the mean loss in ``.grad``."""
    model.zero_grad()
    count = blocks.shape[0] * (blocks.shape[1] - 1)
    for batch in blocks.split(batch_size):
        (token_losses(model, batch).sum() / count).backward()
        tick(len(batch))


def compare(model: nn.Module, mask: ParamMask, embeddings: frozenset[str]) -> dict[str, Any]:
    """Compare the gradients in ``.grad`` inside and outside the ticket.

    Returns `ticket` and `complement` (counts between `edges_log10`, without exact zeros), `zeros`
    and `median` of each (to 0.4%, zeros included), and `auc` and `auc_outside_embeddings` of |g| as
    a detector of the ticket (None if a kind is missing). Raises UserError for non-finite gradients.
    """
    coarse = torch.zeros(2, len(EDGES_LOG10) - 1, dtype=torch.int64)  # complement, ticket
    fine = torch.zeros(2, 2, _FINE, dtype=torch.int64)  # outside embeddings, embeddings
    zeros = torch.zeros(2, dtype=torch.int64)
    edges = (10.0 ** torch.tensor(EDGES_LOG10, dtype=torch.float64)).float()
    for name, param in trainable(model):
        grad = param.grad if param.grad is not None else torch.zeros_like(param)
        magnitudes = grad.detach().float().abs().reshape(-1).cpu()
        if not magnitudes.isfinite().all():
            raise UserError("the gradient of the loss is not finite: is the model damaged?")
        kept = mask.full(name).reshape(-1)
        for kind, own in enumerate((magnitudes[~kept], magnitudes[kept])):
            own_nonzero = own[own > 0]
            zeros[kind] += len(own) - len(own_nonzero)
            bins = torch.bucketize(own_nonzero, edges, right=True) - 1
            coarse[kind] += torch.bincount(bins.clamp_(0, len(edges) - 2), minlength=len(edges) - 1)
            exact = own.view(torch.int32) >> 15
            fine[int(name in embeddings), kind] += torch.bincount(exact, minlength=_FINE)
    kinds = ("complement", "ticket")
    return {
        "edges_log10": list(EDGES_LOG10),
        **{kind: coarse[i].tolist() for i, kind in enumerate(kinds)},
        "zeros": {kind: int(zeros[i]) for i, kind in enumerate(kinds)},
        "elements": {kind: int(fine[:, i].sum()) for i, kind in enumerate(kinds)},
        "median": {kind: _median(fine[:, i].sum(0)) for i, kind in enumerate(kinds)},
        "auc": auc_of_bins(*fine.sum(0)),
        "auc_outside_embeddings": auc_of_bins(*fine[0]),
    }


def _median(counts: torch.Tensor) -> float:
    """Return the lower bound of the bin of the lower middle element."""
    middle = (int(counts.sum()) + 1) // 2
    place = int((counts.cumsum(0) < middle).sum())
    return float(torch.tensor(place << 15, dtype=torch.int32).view(torch.float32))


def auc_of_bins(rest: torch.Tensor, kept: torch.Tensor) -> float | None:
    """Return the chance that a kept element is in a higher bin than another, equal bins counting
    half, from ascending counts per bin. None when one of the two kinds is missing."""
    below = rest.cumsum(0) - rest
    pairs = int(rest.sum()) * int(kept.sum())
    won = (kept.double() * (below.double() + 0.5 * rest.double())).sum()
    return float(won) / pairs if pairs else None
