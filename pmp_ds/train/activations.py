"""The memory of a forward and backward pass, counted on tensors without memory.

A model of any size runs a micro-batch of 2 and one of 4 sequences on the meta device, and the bytes
in use are noted after each operator. Both runs consist of the same operators, so the two numbers
give a line for each of them: the bytes at any size of the micro-batch.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from pmp_ds.config import TrainConfig
from pmp_ds.engine.forward import pad_vocabulary, recompute_activations
from pmp_ds.engine.memory import Meter
from pmp_ds.model.attention import NAME
from pmp_ds.model.next_token import token_losses

_FEW, _MORE = 2, 4  # sequences
Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Timeline:
    """Bytes in use after each of n operators, without weights and without finished gradients."""

    fixed: NDArray[np.float64]  # (n,) whatever the micro-batch
    each: NDArray[np.float64]  # (n,) for every sequence of it
    done: NDArray[np.float64]  # (n,) elements of parameters whose gradients are finished

    def peak(self, sequences: int, per_gradient: float = 0.0) -> int:
        """Return the most bytes at once, with so many for each element of a finished gradient."""
        return int((self.fixed + sequences * self.each + per_gradient * self.done).max())


def timeline(
    model: PreTrainedModel, train: TrainConfig, tokens: int, dtype: torch.dtype, device: str
) -> Timeline:
    """Return the timeline of ``model``, whose parameters are on the meta device, for sequences of
    ``tokens`` tokens; ``device``: `cuda` or `cpu`, which compute the loss in different ways. The
    model is changed. Raises whatever an operator raises that needs the values of its inputs.
    """
    model.to(device="meta", dtype=dtype)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)  # masks are made from values, which do not exist
    recompute_activations(model, train)
    pad_vocabulary(model, torch.device(device))
    losses = _in_blocks if device == "cuda" else token_losses
    few, more = (_run(model.train(), size, tokens, losses) for size in (_FEW, _MORE))
    each = (more[:, 0] - few[:, 0]) / (_MORE - _FEW)
    return Timeline(few[:, 0] - _FEW * each, each, few[:, 1])


def _run(
    model: PreTrainedModel, sequences: int, tokens: int, losses: Losses
) -> NDArray[np.float64]:
    """Return the bytes in use and the elements of finished gradients, (n, 2)."""
    notes: list[tuple[int, int]] = []
    done = 0

    def finish(param: torch.Tensor) -> None:
        nonlocal done
        done += param.numel()
        param.grad = None

    hooks = [p.register_post_accumulate_grad_hook(finish) for p in model.parameters()]
    batch = torch.zeros(sequences, tokens, dtype=torch.int64, device="meta")
    weights = [*model.parameters(), *model.buffers()]
    with Meter(batch.device, lambda held: notes.append((held, done))) as meter, _attention():
        before = meter.peak_of(lambda: _touch(weights))
        notes.clear()
        logits = model(input_ids=batch, use_cache=False).logits
        loss = losses(logits, batch).mean()
        del logits
        loss.backward()
        notes.append((meter.peak_of(lambda: None), done))
    for hook in hooks:
        hook.remove()
    return np.array(notes, dtype=np.float64) - [before, 0]


def _touch(tensors: list[torch.Tensor]) -> None:
    """Make a Meter count these tensors."""
    for tensor in tensors:
        tensor.detach().sum()


@contextlib.contextmanager
def _attention() -> Iterator[None]:
    """Keep what fused attention keeps. On the meta device torch would choose the operators that
    hold a matrix of tokens by tokens."""

    def fused(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        size, operator = value.shape[-1], torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if size != query.shape[-1]:
            value = torch.nn.functional.pad(value, (0, query.shape[-1] - size))
        return operator(query, key, value, 0.0, True)[0][..., :size]

    original = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


class _InBlocks(torch.autograd.Function):
    """What DeepSpeed's Triton kernels for the loss keep and allocate."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return torch.zeros(len(logits), device=logits.device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return torch.zeros_like(ctx.saved_tensors[0])


def _in_blocks(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Stand for engine.objective.in_blocks on a GPU; (B, T) fp32."""
    losses: torch.Tensor = _InBlocks.apply(logits.flatten(0, 1).contiguous())
    return losses.view_as(batch)
