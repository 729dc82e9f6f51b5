"""AdamW on the ticket alone: C++ on CPU, Triton on GPU, else torch operations, to the same bits."""

import math
from typing import Any

import torch

from pmp_ds.config import TrainConfig
from pmp_ds.optim.kernels.batch import Coefficients
from pmp_ds.optim.masked import MaskedOptimizer, Params


class MaskedAdamW(MaskedOptimizer):
    """AdamW (Loshchilov and Hutter, 2019) with compact `exp_avg` and `exp_avg_sq`."""

    moments = ("exp_avg", "exp_avg_sq")
    squares = ("exp_avg_sq",)

    @classmethod
    def settings(cls, config: TrainConfig) -> dict[str, Any]:
        return {"betas": config.betas, "eps": config.eps}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **storage: Any,  # `master` and `moment_format`
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **storage)

    def coefficients(self, group: dict[str, Any], step: float) -> Coefficients:
        return coefficients(group, step)

    def rule(
        self,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        moments: list[torch.Tensor],
        group: dict[str, Any],
        step: float,
    ) -> None:
        exp_avg, exp_avg_sq = moments
        adamw_ref(weights, gradient, exp_avg, exp_avg_sq, coefficients(group, step))


def coefficients(group: dict[str, Any], step: float) -> Coefficients:
    """Return the fp32 coefficients of update ``step`` (from 1), computed in double precision."""
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


def adamw_ref(
    weights: torch.Tensor,  # (n,) fp32, updated in place, as are the moments
    gradient: torch.Tensor,  # (n,) fp32
    exp_avg: torch.Tensor,  # (n,) fp32
    exp_avg_sq: torch.Tensor,  # (n,) fp32
    c: Coefficients,
) -> None:
    """Apply the update in torch operations, on any device; the kernels give the same bits."""
    exp_avg.mul_(c.beta1).add_(gradient * c.grad_weight)
    exp_avg_sq.mul_(c.beta2).add_(gradient * gradient * c.grad_sq_weight)
    root = exp_avg_sq.double().sqrt_().float()  # torch's fp32 sqrt on CPU is not correctly rounded
    # A tensor, because torch on CUDA multiplies by the rounded reciprocal of a Python number.
    correction = torch.full((), c.sqrt_correction2, device=root.device)
    denominator = root.div_(correction).add_(c.eps)
    weights.mul_(c.decay).add_(exp_avg * c.minus_step_size / denominator)
