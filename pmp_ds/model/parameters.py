"""The global element order: which number of the ticket belongs to which weight.

All trainable elements in ``module.named_parameters()`` order, tied weights once, row-major inside
a tensor. It depends on the model alone, never on ranks, ZeRO stage or sharding.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
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
    """All elements are equal at theta(0): norms, biases."""


def parameter_table(model: nn.Module) -> tuple[ParamInfo, ...]:
    """The parameters that count in d, in order. Call it on theta(0), or ``constant`` is wrong.

    The model must be whole: neither on the meta device nor partitioned by ZeRO stage 3.
    """
    table: list[ParamInfo] = []
    start = 0
    for name, param in trainable(model):
        low, high = torch.aminmax(param.detach())
        constant = bool(low == high)
        table.append(ParamInfo(name, tuple(param.shape), param.numel(), start, constant))
        start += param.numel()
    return tuple(table)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that a ticket names, in order: not the frozen and not the empty ones."""
    for name, param in model.named_parameters():
        if param.requires_grad and _shape(param).numel() > 0:
            yield name, param


def trained_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a ticket for ``model``, in order. The model may be on the meta
    device or partitioned."""
    return {name: tuple(_shape(param)) for name, param in trainable(model)}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the same with the frozen and the empty parameters."""
    return {name: tuple(_shape(param)) for name, param in model.named_parameters()}


def _shape(param: nn.Parameter) -> torch.Size:
    # Under ZeRO 3 DeepSpeed (0.19) leaves a parameter empty and keeps its shape in `ds_shape`.
    found: torch.Size = getattr(param, "ds_shape", param.shape)
    return found


def constants(model: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers, by name: of the model's state, though no gradient changes them.

    Checkpoints and releases carry them behind the parameters, in their own dtype; they do not count
    in d, and no ticket names them.
    """
    stored = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def num_params(table: Sequence[ParamInfo]) -> int:
    """d: the number of trainable elements."""
    return sum(info.numel for info in table)


def digest(table: Sequence[ParamInfo]) -> str:
    """SHA-256 (hex) of names and shapes in order: the model that a ticket belongs to."""
    rows = [[info.name, list(info.shape)] for info in table]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 (hex) of the bytes of all trainable elements in order, little-endian as stored.

    Equal digests mean bit-identical weights in the same dtype, so a theta(0) that was drawn again
    can be checked. It is as public as the weights: of a secret theta(0), keep it private.
    """
    sha = hashlib.sha256()
    for _, param in trainable(model):
        flat = param.detach().cpu().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()
