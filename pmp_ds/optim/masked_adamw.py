"""AdamW whose moments exist only for the ticket (paper, Eq. 5).

Each tensor that the optimizer is given (a parameter, or the flat fp32 master partition of a ZeRO
rank) is armed with the packed mask of its elements. `exp_avg` and `exp_avg_sq` are compact: one
value per kept element, in row-major order. The other elements are never written: no momentum, no
weight decay, no rounding.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

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
        self._bits: dict[torch.Tensor, torch.Tensor | None] | None = None

    def arm(self, bits: dict[torch.Tensor, torch.Tensor | None]) -> None:
        """Fix the mask of every tensor and start from fresh moments.

        ``bits``: for each tensor of this optimizer its packed mask (ceil(numel / 8),) uint8 on the
        tensor's device, or None to train all of it.
        """
        self._bits = dict(bits)
        self.state.clear()
        for tensor, mask in self._bits.items():
            num_kept = tensor.numel() if mask is None else popcount(mask)
            self.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                "exp_avg": torch.zeros(num_kept, dtype=torch.float32, device=tensor.device),
                "exp_avg_sq": torch.zeros(num_kept, dtype=torch.float32, device=tensor.device),
            }

    def zero_complement(self, shards: ZeroShards) -> None:
        """Zero the reduced gradient of every element that is not kept."""
        assert self._bits is not None
        for f, gradient in zip(shards.fragments, shards.gradients(), strict=True):
            bits = self._bits[shards.flats[f.flat]]
            if bits is not None:
                for start in range(0, f.numel, CHUNK):
                    chunk = gradient[start : start + CHUNK]
                    kept = unpack(bits, chunk.numel(), f.flat_start + start)
                    chunk.masked_fill_(~kept, 0.0)  # not a product: it may hold NaN

    @property
    def state_bytes(self) -> int:
        """Bytes that the moments and the packed masks take on this rank."""
        assert self._bits is not None
        moments = sum(
            state[name].numel() * state[name].element_size()
            for state in self.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        )
        return moments + sum(mask.numel() for mask in self._bits.values() if mask is not None)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._bits is None:  # DeepSpeed steps once inside `initialize`
            return loss
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, self._bits[tensor], group)
        return loss

    def _update(self, tensor: torch.Tensor, bits: torch.Tensor | None, group: dict) -> None:
        state = self.state[tensor]
        assert tensor.grad is not None
        weights, gradient = tensor.view(-1), tensor.grad.reshape(-1)
        step = state["step"]
        if bits is None:
            _adamw(weights, gradient, state["exp_avg"], state["exp_avg_sq"], step, group)
        else:
            done = 0
            for start in range(0, weights.numel(), CHUNK):
                numel = min(CHUNK, weights.numel() - start)
                kept = unpack(bits, numel, start).nonzero().view(-1)
                span = slice(done, done + kept.numel())
                chunk = weights[start : start + numel]
                values = chunk[kept]
                _adamw(
                    values,
                    gradient[start : start + numel][kept],
                    state["exp_avg"][span],
                    state["exp_avg_sq"][span],
                    step,
                    group,
                )
                chunk[kept] = values
                done += kept.numel()
        state["step"] = step + 1  # a new tensor: ZeRO-3 may share one between sub-groups


def _adamw(
    weights: torch.Tensor,  # (n,) fp32, updated in place, as are the moments
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,  # updates done before this one
    group: dict[str, Any],
) -> None:
    if weights.numel() == 0:
        return
    adamw(
        [weights],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step.clone()],  # torch counts it up in place
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


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
