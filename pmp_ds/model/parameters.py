"""The global element order, which numbers the weights for the ticket.

It covers all trainable elements in ``module.named_parameters()`` order, tied weights once,
row-major inside a tensor. It depends only on the model, never on ranks, ZeRO stage or sharding.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ParamInfo:
    """One trainable parameter; its elements are ``start .. start + numel`` of the global order."""

    name: str
    shape: tuple[int, ...]
    numel: int
    start: int
    constant: bool
    """Whether all elements are equal at theta(0), as in norms and biases; from given weights,
    whether they may have been (``Base.is_constant``)."""


def parameter_table(
    model: nn.Module, constant: Mapping[str, bool] | None = None
) -> tuple[ParamInfo, ...]:
    """Return the parameters that count in d, in order; ``constant``, by name, is found in the
    weights if it is not given, and is right only at theta(0).

    Without it the model must be whole: neither on the meta device nor partitioned by ZeRO stage 3.
    """
    table: list[ParamInfo] = []
    start = 0
    for name, param in trainable(model):
        shape = tuple(shape_of(param))
        same = _is_constant(param) if constant is None else constant[name]
        table.append(ParamInfo(name, shape, math.prod(shape), start, same))
        start += table[-1].numel
    return tuple(table)


def _is_constant(param: nn.Parameter) -> bool:
    low, high = torch.aminmax(param.detach())
    return bool(low == high)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that a ticket covers, in order: neither frozen nor empty ones."""
    for name, param in model.named_parameters():
        if param.requires_grad and shape_of(param).numel() > 0:
            yield name, param


def trained_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a ticket for ``model``, in order. The model may be on the meta
    device or partitioned."""
    return {name: tuple(shape_of(param)) for name, param in trainable(model)}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the same, including frozen and empty parameters."""
    return {name: tuple(shape_of(param)) for name, param in model.named_parameters()}


def shape_of(param: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, whole or partitioned."""
    # Under ZeRO 3, DeepSpeed 0.19.8 leaves a parameter empty and keeps its shape in `ds_shape`.
    found: torch.Size = getattr(param, "ds_shape", param.shape)
    return found


def constants(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the persistent buffers by name: part of the model's state, but without gradients.

    Checkpoints and releases store them after the parameters, in their own dtype. They do not count
    in d, and no ticket covers them.
    """
    stored = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def num_params(table: Sequence[ParamInfo]) -> int:
    """Return d, the number of trainable elements."""
    return sum(info.numel for info in table)


def digest(table: Sequence[ParamInfo]) -> str:
    """Return the SHA-256 (hex) of names and shapes in order, which identifies a ticket's model."""
    rows = [[info.name, list(info.shape)] for info in table]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of all trainable elements' bytes in order, little-endian as stored.

    Equal digests mean bit-identical weights in the same dtype; a redrawn theta(0) is checked this
    way. The digest is as public as the weights: keep that of a secret theta(0) private.
    """
    sha = hashlib.sha256()
    for _, param in trainable(model):
        flat = param.detach().cpu().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()
