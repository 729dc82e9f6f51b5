"""Check by names and shapes that a mask belongs to a model."""

from collections.abc import Mapping
from pathlib import Path

import torch

from pmp_ds.errors import UserError
from pmp_ds.ticket.mask import ParamMask, pack


def fitted(mask: ParamMask, shapes: Mapping[str, tuple[int, ...]], model: str | Path) -> ParamMask:
    """Return ``mask`` on the trained parameters of ``model``, in the order of their ``shapes``. A
    release lacks rows that only padded its vocabulary; so does the result. Raises UserError when
    the mask belongs to another model."""
    for name in sorted(mask.shapes.keys() ^ shapes.keys()):
        how = "lacks" if name in mask.shapes else "has another parameter,"
        raise UserError(f"the ticket belongs to another model: {model} {how} {name}")
    bits = {}
    for name, shape in shapes.items():
        own = mask.shapes[name]
        if own[1:] != shape[1:] or own[:1] < shape[:1]:
            raise UserError(
                f"the ticket belongs to another model: {name} has shape {list(shape)} in {model}, "
                f"but {list(own)} in the ticket"
            )
        bits[name] = mask.bits[name]
        if own != shape:
            bits[name] = pack(mask.fragment(name, 0, torch.Size(shape).numel()))
    return ParamMask(bits=bits, shapes=dict(shapes))
