"""No ZeRO: every rank holds all parameters (fp32), or also fp32 clones of them (16-bit)."""

from collections.abc import Mapping
from typing import Any

import torch

from pmp_ds.optim.zero.shards import Fragment, forget, gradient_of, norm_over_ranks


class Stage0:
    replicated = True

    def __init__(self, engine: Any, names: Mapping[torch.Tensor, str]) -> None:
        self._engine, self._zero = engine, engine.optimizer
        groups = getattr(self._zero, "fp16_groups", None)
        if groups is None:  # fp32: DeepSpeed does not wrap the client optimizer
            groups = [group["params"] for group in self._zero.param_groups]
            self.flats = [param for group in groups for param in group]
        else:
            self.flats = [clone for group in self._zero.fp32_groups for clone in group]
        self._wrapped = hasattr(self._zero, "fp16_groups")
        self._sizes = [len(group) for group in groups]
        self.groups = [i for i, group in enumerate(groups) for _ in group]
        self._params = [param for group in groups for param in group]
        self.fragments = [
            Fragment(names[param], 0, param.numel(), i, 0) for i, param in enumerate(self._params)
        ]
        self.device = self._params[0].device
        self.clip_norm = float(engine.gradient_clipping())
        self.scales_loss = bool(engine.fp16_enabled())

    @property
    def loss_scale(self) -> float:
        return float(self._zero.loss_scale) if self._wrapped else 1.0

    def gradients(self) -> list[torch.Tensor]:
        return [gradient_of(param).view(-1) for param in self._params]

    def weights(self) -> list[torch.Tensor] | None:
        return [param.detach().view(-1) for param in self._params] if self._wrapped else None

    def norm(self, squares: torch.Tensor) -> torch.Tensor:
        return norm_over_ranks(squares, self._sizes, torch.float32, replicated=True)

    def drop_fp32_master(self) -> None:
        raise AssertionError("deepspeed_config refuses a compact master at stage 0")

    def replace_step(self, step: Any) -> None:
        self._zero.step = step
        if not self._wrapped:  # the engine itself would clip first, gradients of any mask
            self._engine.clip_fp32_gradients = lambda: None

    def free(self) -> None:
        forget(self._zero, self._params)

    def before_step(self) -> None:
        if self._wrapped:
            self._zero.overflow = False

    def count(self, overflow: bool, norm: torch.Tensor) -> None:
        self._zero._global_grad_norm = norm
        if self._wrapped:
            self._zero.overflow = overflow
            self._zero._update_scale(overflow)

    def after_step(self) -> None:
        pass  # the engine clears the gradients

    discard = after_step
