"""Measure how well scores separate the ticket from the rest: AUC, and IoU at the true density."""

import torch

from pmp_ds.evaluate.gradients import auc_of_bins


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Return the chance that a kept element scores above another, ties counting half: (n,) float,
    (n,) bool. None when one of the two kinds is missing."""
    kept, rest = _counts(scores, labels)
    return auc_of_bins(rest, kept)


def recovered_iou(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the IoU of the ticket with as many highest scores; ties give the expected share."""
    k = int(labels.sum())
    kept, rest = _counts(scores, labels)
    kept, rest = kept.flip(0), rest.flip(0)
    sizes = (kept + rest).double()
    taken = (k - (sizes.cumsum(0) - sizes)).clamp(min=0).minimum(sizes)
    common = float((taken * kept.double() / sizes).sum())
    return common / (2 * k - common) if k else 1.0


def chance_iou(labels: torch.Tensor) -> float:
    """Return the expected IoU of the ticket with a uniform mask of its density."""
    density = float(labels.double().mean())
    return density / (2.0 - density)


def _counts(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many kept elements, and how many others, have each distinct score, ascending."""
    _, group = scores.unique(return_inverse=True)
    num_groups = int(group.max()) + 1 if group.numel() else 0
    kept = torch.bincount(group[labels], minlength=num_groups)
    return kept, torch.bincount(group, minlength=num_groups) - kept
