"""Derivative dither: the frozen elements of a fine-tuned model get changes like the ticket's.

In an authorized derivative, only ticket elements differ from the released base, so the difference
is the mask. Dither gives every complement element the change of a ticket element of nearly the same
magnitude, slightly scaled so that no two changes are equal. The choice of that element balances
rows:

- A row (of any matrix of the model) that keeps less than the model's share p uses changes of its
  own for only some of its frozen elements, so that p of the elements that look like this row are
  kept. The rest, including all of a row or tensor without ticket elements, look like another row.
- That other row is drawn from those that keep more than p, in proportion to the frozen elements
  that they lack.

So, over the model, the changes of frozen and of kept elements have one distribution. Not imitated
are structures over many elements, such as the low rank of an update or the size of a whole tensor's
changes, and the direction of changes along the gradient of a text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pmp_ds.ticket.mask import ParamMask

Uniforms = Callable[[int], torch.Tensor]  # n -> (n,) in (0, 1), fresh at every call
Tensors = Callable[[str], torch.Tensor]  # parameter -> its values

WINDOW = 32  # number of ticket elements of nearest magnitude to draw a change from
JITTER = 0.2  # largest relative change of a change
POOL = 1024  # rows that others take their changes from
_CHUNK = 1 << 22  # elements processed at once


@dataclass(frozen=True)
class Donors:
    """Rows of the model's matrices, or of its vectors, that keep more than the model's share."""

    share: float
    """The ticket's share of the elements of all those rows."""

    magnitudes: torch.Tensor
    """(P, W) fp32: |base| of each row's ticket elements, ascending, then infinity."""

    changes: torch.Tensor
    """(P, W) fp32: their changes, in the same order."""

    counts: torch.Tensor
    """(P,) int64: ticket elements of each row."""


def draw_donors(
    mask: ParamMask, base: Tensors, changed: Tensors, uniforms: Uniforms
) -> Mapping[bool, Donors]:
    """Return the rows to draw from, for matrices (True) and for vectors (False)."""
    found = {}
    for matrices in {len(shape) > 1 for shape in mask.shapes.values()}:
        names = [name for name, shape in mask.shapes.items() if (len(shape) > 1) is matrices]
        counts = {name: _rows(mask.full(name)).sum(1) for name in names}
        columns = {name: mask.numel(name) // len(counts[name]) for name in names}
        share = sum(int(c.sum()) for c in counts.values()) / sum(map(mask.numel, names))
        if not 0 < share < 1:
            continue
        lacking = [
            (counts[name] / share - columns[name]).clamp(min=0).double() for name in names
        ]  # frozen elements that a row of this share would have beyond its own
        chosen = _weighted(torch.cat(lacking), uniforms, POOL)
        rows, first = [], 0
        for name in names:
            here = chosen[(chosen >= first) & (chosen < first + len(counts[name]))] - first
            first += len(counts[name])
            if not len(here):
                continue
            tensors = (base(name), changed(name), mask.full(name))
            old, new, kept = (_rows(tensor)[here] for tensor in tensors)
            magnitudes, change = old.float().abs(), new.float() - old.float()
            for size, move, own in zip(magnitudes, change, kept, strict=True):
                order = size[own].argsort(stable=True)
                rows.append((size[own][order], move[own][order]))
        pad = torch.nn.utils.rnn.pad_sequence
        found[matrices] = Donors(
            share,
            pad([m for m, _ in rows], batch_first=True, padding_value=torch.inf),
            pad([c for _, c in rows], batch_first=True),
            torch.tensor([len(m) for m, _ in rows]),
        )
    return found


def dither(
    base: torch.Tensor,
    changed: torch.Tensor,
    kept: torch.Tensor,
    donors: Mapping[bool, Donors],
    uniforms: Uniforms,
) -> torch.Tensor:
    """Return ``changed`` with its complement dithered, in its own dtype and shape.

    ``base`` is the release's tensor, in the same dtype; ``kept`` (bool) is the ticket, outside
    which ``changed`` equals ``base``. A model without ticket elements is returned unchanged.
    """
    others = donors.get(base.ndim > 1)
    if bool(kept.all()) or others is None:
        return changed
    rows = [_rows(tensor) for tensor in (base, changed, kept)]
    step = max(1, _CHUNK // rows[0].shape[1])
    parts = [
        _dither_rows(old, new, own, others, uniforms)
        for old, new, own in zip(*(each.split(step) for each in rows), strict=True)
    ]
    return torch.cat(parts).view(changed.shape)


def _dither_rows(
    base: torch.Tensor,  # (R, C)
    changed: torch.Tensor,  # (R, C)
    kept: torch.Tensor,  # (R, C) bool
    others: Donors,
    uniforms: Uniforms,
) -> torch.Tensor:
    change = changed.float() - base.float()
    share = kept.double().mean(1)
    ratio = share * (1 - others.share) / (others.share * (1 - share))  # infinite for a full row
    foreign = ratio < 1
    result = _moved(base, _own(base, change, kept, uniforms), uniforms)
    if bool(foreign.any()):
        taken = _taken(base[foreign], others, uniforms)
        moved = _moved(base[foreign], taken, uniforms)
        own = uniforms(moved.numel()).view(moved.shape) < ratio[foreign, None]
        result[foreign] = torch.where(own, result[foreign], moved)
    return torch.where(kept, changed, result)


def _own(
    base: torch.Tensor, change: torch.Tensor, kept: torch.Tensor, uniforms: Uniforms
) -> torch.Tensor:
    """Return a change of the same row for each element, 0 in rows without any, (R, C)."""
    magnitudes = base.float().abs().masked_fill(~kept, torch.inf)
    magnitudes, order = magnitudes.sort(dim=1, stable=True)
    return _nearest(base, magnitudes, change.gather(1, order), kept.sum(1), uniforms)


def _taken(base: torch.Tensor, others: Donors, uniforms: Uniforms) -> torch.Tensor:
    """Return, for each row, changes of one other row, (R, C)."""
    source = (uniforms(len(base)) * len(others.counts)).long()
    rows = (others.magnitudes[source], others.changes[source], others.counts[source])
    return _nearest(base, *rows, uniforms)


def _nearest(
    base: torch.Tensor,  # (R, C)
    magnitudes: torch.Tensor,  # (R, W) ascending
    changes: torch.Tensor,  # (R, W)
    counts: torch.Tensor,  # (R,)
    uniforms: Uniforms,
) -> torch.Tensor:
    """Return, for each element, one of the WINDOW changes of nearest magnitude, (R, C)."""
    place = torch.searchsorted(magnitudes, base.float().abs().contiguous())
    width = counts.clamp(max=WINDOW)[:, None]
    low = (place - width // 2).clamp(min=0).minimum(counts[:, None] - width)
    draw = (uniforms(base.numel()).view(base.shape) * width).long()
    found = changes.gather(1, (low + draw).clamp(min=0))
    return torch.where(counts[:, None] > 0, found, 0)


def _moved(base: torch.Tensor, change: torch.Tensor, uniforms: Uniforms) -> torch.Tensor:
    scale = 1 + JITTER * (2 * uniforms(base.numel()).view(base.shape) - 1)
    return (base.double() + change.double() * scale).to(base.dtype)


def _weighted(weights: torch.Tensor, uniforms: Uniforms, count: int) -> torch.Tensor:
    """Return ``count`` indices, ascending, each drawn in proportion to its weight."""
    ends = weights.cumsum(0)
    found = torch.searchsorted(ends, uniforms(count).double() * ends[-1], right=True)
    return found.clamp(max=len(weights) - 1).sort().values


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of (rows, columns); a vector is one row."""
    return tensor.reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1)
