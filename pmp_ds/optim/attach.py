"""Apply the masked update as a library, to a plain torch module or to any DeepSpeed engine.

    ticket = load_ticket(Path("runs/demo/private/ticket"))
    optimizer = MaskedAdamW(model.parameters(), lr=3e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    attach(engine, optimizer, ticket.mask)

With ZeRO, DeepSpeed 0.19.8 accepts the optimizer only with `"zero_allow_untested_optimizer": true`
in its config, and under CPU offload only with `"zero_force_ds_cpu_optimizer": false` as well.
"""

from collections.abc import Callable
from typing import Any

import torch

from pmp_ds.errors import UserError
from pmp_ds.model.parameters import shapes, trainable, trained_shapes
from pmp_ds.optim.kernels.batch import Segment
from pmp_ds.optim.low_bit import stream_of
from pmp_ds.optim.masked import MaskedOptimizer
from pmp_ds.optim.stored import CHUNK
from pmp_ds.optim.zero import MaskedStep, ZeroShards, flat_masks, shards_of
from pmp_ds.ticket.mask import ParamMask, unpack


def attach(target: Any, optimizer: MaskedOptimizer, mask: ParamMask | None) -> None:
    """Train only the elements in ``mask`` (None: all) of ``target``, starting from fresh state.

    ``target`` is a DeepSpeed engine created with ``optimizer``, or a torch module whose parameters
    ``optimizer`` holds. Clipping sees the ticket alone: an engine's ``step`` measures nothing else,
    and in a module gradients of the complement are zero after ``backward``, in time for
    ``torch.nn.utils.clip_grad_norm_``.

    Raises UserError, before anything changes, when a parameter of ``mask`` is missing from
    ``target`` or has another shape there, or when ``target`` trains a parameter outside ``mask``.
    """
    is_engine = hasattr(target, "is_gradient_accumulation_boundary")
    if mask is not None:
        _require_fit(target.module if is_engine else target, mask)
    if is_engine:
        arm(optimizer, shards_of(target), mask)
    else:
        _attach_module(target, optimizer, mask)


def _require_fit(module: torch.nn.Module, mask: ParamMask) -> None:
    own, trained = shapes(module), trained_shapes(module)
    problems = [
        f"{name!r} is {_in_words(own.get(name))} in the model and "
        f"{_in_words(mask.shapes.get(name))} in the ticket"
        for name in sorted(trained.keys() | mask.shapes.keys())
        if own.get(name) != mask.shapes.get(name)
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        if own.items() >= mask.shapes.items():
            more += "; freeze parameters outside the ticket with requires_grad_(False)"
        raise UserError(f"the ticket belongs to another model: {'; '.join(problems[:3])}{more}")


def _in_words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


def arm(optimizer: MaskedOptimizer, shards: ZeroShards, mask: ParamMask | None) -> MaskedStep:
    """Give the optimizer its share of ``mask`` and replace DeepSpeed's ``step``; return ours. A
    compact or split master also replaces the dense fp32 one."""
    segments = [fragment.segment for fragment in shards.fragments]
    optimizer.arm(flat_masks(shards, mask), segments, shards.groups, shards.drop_fp32_master)
    step = MaskedStep(optimizer, shards)
    shards.replace_step(step)
    return step


def _attach_module(
    module: torch.nn.Module, optimizer: MaskedOptimizer, mask: ParamMask | None
) -> None:
    own = {param for param in module.parameters() if param.requires_grad}
    if any(param not in own for group in optimizer.param_groups for param in group["params"]):
        raise UserError("the optimizer holds a parameter that is not trainable in the model")
    bits: dict[torch.Tensor, torch.Tensor | None] = {}
    segments: list[Segment] = []
    for name, param in trainable(module):
        bits[param] = None if mask is None else mask.bits[name].to(param.device)
        if mask is not None:
            param.register_post_accumulate_grad_hook(_zero_complement(bits[param]))
        segments.append(Segment(len(segments), 0, param.numel(), 0, stream_of(name)))
    optimizer.arm(bits, segments)


def _zero_complement(bits: torch.Tensor | None) -> Callable[[torch.Tensor], None]:
    def hook(param: torch.Tensor) -> None:
        assert param.grad is not None
        assert bits is not None
        gradient = param.grad.view(-1)
        for start in range(0, gradient.numel(), CHUNK):
            chunk = gradient[start : start + CHUNK]
            kept = unpack(bits, chunk.numel(), start)
            chunk.masked_fill_(~kept, 0.0)  # not a product: it may hold NaN

    return hook
