"""More element-wise optimizers on the ticket alone, in torch operations."""

from typing import Any

import torch

from pmp_ds.config import TrainConfig
from pmp_ds.optim.masked import MaskedOptimizer, Params


class MaskedSGD(MaskedOptimizer):
    """SGD with momentum and decoupled weight decay; compact `momentum_buffer`."""

    moments = ("momentum_buffer",)

    @classmethod
    def settings(cls, config: TrainConfig) -> dict[str, Any]:
        assert config.betas is not None
        return {"momentum": config.betas[0]}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **storage: Any,  # `master` and `moment_format`
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, **storage)

    def rule(
        self,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        moments: list[torch.Tensor],
        group: dict[str, Any],
        step: float,
    ) -> None:
        (buffer,) = moments
        buffer.mul_(group["momentum"]).add_(gradient)
        weights.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(buffer, alpha=-group["lr"])


class MaskedLion(MaskedOptimizer):
    """Lion (Chen et al., 2023, algorithm 2); compact `exp_avg`."""

    moments = ("exp_avg",)

    @classmethod
    def settings(cls, config: TrainConfig) -> dict[str, Any]:
        return {"betas": config.betas}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **storage: Any,  # `master` and `moment_format`
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, **storage)

    def rule(
        self,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        moments: list[torch.Tensor],
        group: dict[str, Any],
        step: float,
    ) -> None:
        (exp_avg,) = moments
        beta1, beta2 = group["betas"]
        direction = exp_avg.mul(beta1).add_(gradient, alpha=1.0 - beta1).sign_()
        weights.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        exp_avg.mul_(beta2).add_(gradient, alpha=1.0 - beta2)
