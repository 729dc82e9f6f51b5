"""AdamW whose moments exist only for the ticket (paper, Eq. 5).

Each tensor that the optimizer is given (a parameter, or the flat fp32 master partition of a ZeRO
rank) is armed with the packed mask of its elements. `exp_avg` and `exp_avg_sq` are compact: one
value per kept element, in row-major order. The other elements are never written: no momentum, no
weight decay, no rounding.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pmp_ds.optim.kernels import kernels_for
from pmp_ds.optim.kernels.cpu import Coefficients
from pmp_ds.optim.zero_shards import ZeroShards
from pmp_ds.ticket.mask import popcount, unpack

CHUNK = 1 << 20  # elements gathered at once; a multiple of 8

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]]


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW on the kept elements of each tensor. Does nothing until ``arm`` is called.

    State per tensor: `exp_avg` and `exp_avg_sq` (num_kept,) fp32, `step` () fp32. Groups may come
    in any order and number at each ``step``, as ZeRO hands them over one by one.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self._masks: dict[torch.Tensor, _Mask] | None = None

    def arm(self, bits: dict[torch.Tensor, torch.Tensor | None]) -> None:
        """Fix the mask of every tensor and start from fresh moments.

        ``bits``: for each tensor of this optimizer its packed mask (ceil(numel / 8),) uint8 on the
        tensor's device, or None to train all of it.
        """
        self._masks = {tensor: _Mask(mask, tensor) for tensor, mask in bits.items()}
        self.state.clear()
        for tensor, mask in self._masks.items():
            self.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros(mask.num_kept, dtype=torch.float32, device=tensor.device),
                "exp_avg_sq": torch.zeros(mask.num_kept, dtype=torch.float32, device=tensor.device),
            }

    def zero_complement(self, shards: ZeroShards) -> None:
        """Zero the reduced gradient of every element that is not kept."""
        assert self._masks is not None
        for f, gradient in zip(shards.fragments, shards.gradients(), strict=True):
            mask = self._masks[shards.flats[f.flat]]
            if mask.bits is None:
                continue
            zero = mask.kernels.zero_complement if mask.kernels else zero_complement_ref
            zero(gradient, mask.bits, f.flat_start)

    @property
    def num_updates(self) -> int:
        """Updates made since ``arm``."""
        return max((int(state["step"]) for state in self.state.values()), default=0)

    @property
    def state_bytes(self) -> int:
        """Bytes that the moments and the packed masks take on this rank."""
        assert self._masks is not None
        tensors = [mask.bits for mask in self._masks.values() if mask.bits is not None]
        for state in self.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
        return sum(tensor.nbytes for tensor in tensors)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._masks is None:  # DeepSpeed steps once inside `initialize`
            return loss
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, self._masks[tensor], group)
        return loss

    def _update(self, tensor: torch.Tensor, mask: "_Mask", group: dict[str, Any]) -> None:
        assert tensor.grad is not None
        state = self.state[tensor]
        state["step"] = state["step"] + 1  # a new tensor: ZeRO-3 may share one between sub-groups
        weights, gradient = tensor.view(-1), tensor.grad.reshape(-1)
        moments = state["exp_avg"], state["exp_avg_sq"]
        coefficients = _coefficients(group, float(state["step"]))
        if mask.kernels:
            mask.kernels.masked_adamw(
                weights, gradient, mask.bits, mask.prefix, *moments, coefficients
            )
        else:
            masked_adamw_ref(weights, gradient, mask.bits, *moments, coefficients)


class _Mask:
    """The packed mask of one tensor, and the operators for its device with what they need."""

    def __init__(self, bits: torch.Tensor | None, tensor: torch.Tensor) -> None:
        self.bits = bits
        self.num_kept = tensor.numel() if bits is None else popcount(bits)
        self.kernels = kernels_for(tensor)
        self.prefix = None
        if bits is not None and self.kernels:
            self.prefix = self.kernels.block_prefix(bits)


def _coefficients(group: dict[str, Any], step: float) -> Coefficients:
    """``step`` counts the update to be made, from 1. Computed in double precision, used in fp32."""
    beta1, beta2 = group["betas"]
    return Coefficients(
        decay=1.0 - group["lr"] * group["weight_decay"],
        beta1=beta1,
        grad_weight=1.0 - beta1,
        beta2=beta2,
        grad_sq_weight=1.0 - beta2,
        minus_step_size=-group["lr"] / (1.0 - beta1**step),
        sqrt_correction2=math.sqrt(1.0 - beta2**step),
        eps=group["eps"],
    )


def masked_adamw_ref(
    weights: torch.Tensor,  # (numel,) fp32, updated in place, as are the moments
    gradient: torch.Tensor,  # (numel,)
    bits: torch.Tensor | None,  # (ceil(numel / 8),) uint8; None: all kept
    exp_avg: torch.Tensor,  # (num_kept,)
    exp_avg_sq: torch.Tensor,  # (num_kept,)
    c: Coefficients,
) -> None:
    """The update in torch operations, on any device; the operators give the same bits."""
    done = 0
    for start in range(0, weights.numel(), CHUNK):
        p, g = weights[start : start + CHUNK], gradient[start : start + CHUNK]
        kept = None
        if bits is not None:
            kept = unpack(bits, p.numel(), start).nonzero().view(-1)
            p, g = p[kept], g[kept]
        span = slice(done, done + p.numel())
        done = span.stop
        m, v = exp_avg[span], exp_avg_sq[span]
        m.mul_(c.beta1).add_(g * c.grad_weight)
        v.mul_(c.beta2).add_(g * g * c.grad_sq_weight)
        root = v.double().sqrt_().float()  # torch's fp32 sqrt on CPU is not correctly rounded
        # Not by a Python number: on CUDA torch would multiply by its rounded reciprocal.
        correction = torch.full((), c.sqrt_correction2, device=root.device)
        denominator = root.div_(correction).add_(c.eps)
        p.mul_(c.decay).add_(m * c.minus_step_size / denominator)
        if kept is not None:
            weights[start : start + CHUNK][kept] = p


def zero_complement_ref(gradient: torch.Tensor, bits: torch.Tensor, start: int) -> None:
    """Zero each element i of ``gradient`` whose bit ``start + i`` is 0, in place."""
    for first in range(0, gradient.numel(), CHUNK):
        chunk = gradient[first : first + CHUNK]
        kept = unpack(bits, chunk.numel(), start + first)
        chunk.masked_fill_(~kept, 0.0)  # not a product: it may hold NaN


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: matrices with ``weight_decay``, vectors (norms, biases) without."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            (matrices if parameter.dim() >= 2 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
