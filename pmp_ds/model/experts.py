"""Experts of any width.

transformers computes experts with torch's grouped matrix product, which refuses (2.13) matrices
whose rows are not a multiple of 16 bytes long, and on a GPU those that begin elsewhere. Importing
this module makes transformers compute such experts one after the other, with its own plain
implementation. The choice by width is the same in any precision, at any ZeRO stage and on any
number of ranks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from pmp_ds.model.parameters import shape_of

PLAIN = "eager"
"""transformers' name of its plain implementation."""
_BYTES = 16
_ALIGNED = 8  # elements of 16 bits; in fp32 too, because a release may be rounded when it is loaded


def _matrices(experts: nn.Module) -> Iterator[nn.Parameter]:
    return (param for param in experts.parameters() if len(shape_of(param)) == 3)


def _regular(experts: nn.Module) -> bool:
    return not any(n % _ALIGNED for matrix in _matrices(experts) for n in shape_of(matrix)[1:])


def _forward(experts: Any, *args: torch.Tensor) -> torch.Tensor:
    """Stand for ``grouped_mm_experts_forward``."""
    plain = type(experts).forward.__wrapped__
    forward = grouped_mm_experts_forward if _regular(experts) else plain
    computed: torch.Tensor = forward(experts, *args)
    return computed


ExpertsInterface.register("grouped_mm", _forward)


def _experts(model: nn.Module) -> Iterator[nn.Module]:
    # transformers sets this attribute in all modules that have the choice.
    return (module for module in model.modules() if hasattr(module, "is_transposed"))


def needs_plain(model: nn.Module) -> bool:
    """Return whether experts of ``model`` have widths that the grouped product refuses, so that
    without this module only ``PLAIN`` computes them. It may be on the meta device."""
    return not all(map(_regular, _experts(model)))


def settle_experts(model: Any, *, gathered: bool) -> str | None:
    """Choose how a model computes experts that lie where its engine put them; ``gathered``: ZeRO 3
    collects them elsewhere. Returns a line for the user if that is not the fast way."""
    if needs_plain(model):
        why = f"their widths are not all multiples of {_ALIGNED}"
    elif not gathered and any(map(_misplaced, _experts(model))):
        model.set_experts_implementation(PLAIN)
        why = f"they do not begin at multiples of {_BYTES} bytes"
    else:
        return None
    return f"experts are computed one after the other, which is slower: {why}"


def _misplaced(experts: nn.Module) -> bool:
    held = (getattr(matrix, "ds_tensor", matrix) for matrix in _matrices(experts))
    return any(tensor.is_cuda and tensor.data_ptr() % _BYTES for tensor in held)
