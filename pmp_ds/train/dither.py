"""Derivative dither: the frozen elements of a fine-tuned matrix get changes like the ticket's.

Of an authorized derivative only ticket elements differ from the released base, so the difference
is the mask. Here every complement element takes the change of a ticket element of the same row and
of nearly the same magnitude, scaled a little so that no two changes are equal. Beyond the
magnitudes themselves, which are public, one element's change then tells nothing about the mask.
Structure over many elements, such as the low rank of an update, is not imitated.
"""

from collections.abc import Callable

import torch

Uniforms = Callable[[int], torch.Tensor]  # n -> (n,) in (0, 1), fresh at every call

WINDOW = 32  # ticket elements of nearest magnitude that a change is drawn from
JITTER = 0.2  # largest relative change of a change
_CHUNK = 1 << 22  # elements worked on at once


def dither(
    base: torch.Tensor, changed: torch.Tensor, kept: torch.Tensor, uniforms: Uniforms
) -> torch.Tensor:
    """``changed`` with its complement dithered, in its own dtype and shape.

    ``base`` is the release's tensor, in the same dtype; ``kept`` (bool) is the ticket, outside
    which ``changed`` equals ``base``. A tensor without ticket elements comes back as it is.
    """
    if bool(kept.all()) or not bool(kept.any()):
        return changed
    rows = base.shape[0] if base.ndim > 1 else 1
    columns = base.numel() // rows
    parts = []
    for low in range(0, rows, max(1, _CHUNK // columns)):
        chunk = slice(low, low + max(1, _CHUNK // columns))
        old, new, mask = (each.reshape(rows, columns)[chunk] for each in (base, changed, kept))
        parts.append(_dither_rows(old, new, mask, uniforms))
    return torch.cat(parts).view(changed.shape)


def _dither_rows(
    base: torch.Tensor,  # (R, C)
    changed: torch.Tensor,  # (R, C)
    kept: torch.Tensor,  # (R, C) bool
    uniforms: Uniforms,
) -> torch.Tensor:
    change = changed.float() - base.float()
    order = base.float().abs().argsort(dim=1, stable=True)
    kept_sorted = kept.gather(1, order)
    before = kept_sorted.cumsum(1)  # ticket elements of smaller magnitude
    # Columns of the row's ticket elements by magnitude, then of the others.
    donors = order.gather(1, kept_sorted.logical_not().byte().argsort(dim=1, stable=True))
    row, place = kept_sorted.logical_not().nonzero(as_tuple=True)
    source = _source_rows(before[:, -1], uniforms)[row]
    count = before[source, -1]
    width = torch.where(source == row, count.clamp(max=WINDOW), count)
    low = (before[row, place] - width // 2).clamp(min=0).minimum(count - width)
    picked = donors[source, low + (uniforms(row.numel()) * width).long()]
    scale = 1 + JITTER * (2 * uniforms(row.numel()) - 1)
    column = order[row, place]
    result = changed.clone()
    moved = base[row, column].double() + change[source, picked].double() * scale
    result[row, column] = moved.to(changed.dtype)
    return result


def _source_rows(counts: torch.Tensor, uniforms: Uniforms) -> torch.Tensor:
    """(R,) row that each row takes its changes from: itself, or any other if it has no ticket."""
    source = torch.arange(counts.numel())
    empty, filled = (counts == 0).nonzero()[:, 0], counts.nonzero()[:, 0]
    if empty.numel() and filled.numel():
        source[empty] = filled[(uniforms(empty.numel()) * filled.numel()).long()]
    return source
