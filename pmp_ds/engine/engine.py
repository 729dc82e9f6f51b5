"""A DeepSpeed engine that trains only a ticket.

Once it is armed, DeepSpeed's ``step`` is ours (optim/zero/step.py): it measures and clips the
ticket's gradients and updates the ticket's elements, and no others (paper, Eq. 5).
"""

import gc
import math
from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import torch
from transformers import PreTrainedModel

from pmp_ds import dist
from pmp_ds.config import TrainConfig
from pmp_ds.config.moments import FP32
from pmp_ds.config.precision import precision_of
from pmp_ds.engine.clock import DeviceClock, Span
from pmp_ds.engine.cut import Cut
from pmp_ds.engine.deepspeed_config import master_of, merge, zero_stage
from pmp_ds.engine.forward import compile_layers, pad_vocabulary, recompute_activations
from pmp_ds.engine.objective import NextToken, Objective
from pmp_ds.engine.placement import Fill, place
from pmp_ds.engine.portable import Portable
from pmp_ds.model.experts import settle_experts
from pmp_ds.model.parameters import shapes
from pmp_ds.optim.attach import arm
from pmp_ds.optim.logical_state import Collected, Read, collect, restore
from pmp_ds.optim.masked import parameter_groups
from pmp_ds.optim.rules import optimizer_of
from pmp_ds.optim.zero import MaskedStep, shards_of
from pmp_ds.ticket.mask import ParamMask


class Engine(Portable):
    """One model under DeepSpeed with a masked optimizer; frozen until ``arm``.

    ``model`` holds the initial weights, in fp32 on CPU; or its parameters are on the meta device,
    and ``fill`` gives their values.
    """

    mask: ParamMask | None = None
    """The mask passed to ``arm``."""
    _step: MaskedStep | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        ds_config: dict[str, Any],
        objective: Objective | None = None,  # NextToken() unless given
        fill: Fill | None = None,
    ) -> None:
        merged, dtype = merge(ds_config, config, dist.world_size()), precision_of(config).dtype
        if fill is not None:
            place(model, fill, merged, dtype, dist.device(), quiet=dist.rank() > 0)
        self.optimizer = optimizer_of(
            config,
            parameter_groups(model.named_parameters(), config.weight_decay),
            master=master_of(ds_config),
        )
        self.hf_config = model.config
        self._objective = objective or NextToken()
        self._cut = Cut.of(config, dist.world_size())
        self._sixteen_bit = precision_of(config).has_master
        self._dynamic_scale = precision_of(config).scales_loss
        self._clock = DeviceClock(dist.device())
        self._step_clock = DeviceClock(dist.device())
        self.num_params = sum(math.prod(shape) for shape in shapes(model).values())
        self.dtype = dtype
        logger = ds_config.get("comms_logger") or {}
        self._measures_communication = bool(logger.get("enabled", False))
        recompute_activations(model, config)
        pad_vocabulary(model, dist.device())
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=merged,
            dist_init_required=False,
        )
        # Rotary frequencies must stay fp32, as in the release. DeepSpeed 0.19.8 leaves them so
        # unless data_types.buffer_dtype is set; whole-module casts of older versions did not.
        for name, buffer in self._engine.module.named_buffers():
            buffer.data = buffers[name].to(buffer.device)
        self.shards = shards_of(self._engine)
        stage = zero_stage(ds_config)
        notes = (
            compile_layers(model, config, self.device, stage),
            settle_experts(model, gathered=stage == 3 and dist.world_size() > 1),
        )
        self.notes = [note for note in notes if note is not None]

    def arm(self, mask: ParamMask | None) -> None:
        """Train the elements in ``mask`` (None: all) from fresh moments."""
        self.mask, self._step = mask, arm(self.optimizer, self.shards, mask)

    @property
    def armed(self) -> bool:
        return self._step is not None

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def losses(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the loss of each sample of a batch on the device, (B,) fp32; nats for tokens."""
        return self._objective.losses(self._objective.logits(self._engine, batch), batch)

    def backward(self, batch: torch.Tensor) -> torch.Tensor:
        """Compute the gradients of this rank's share of one update, (n, T) int64.

        They are reduced over ranks and accumulation steps to those of the mean loss of the global
        batch. Returns a loss, () fp32, whose mean over the ranks is that mean; with equal shares it
        is the share's own loss.
        """
        self._engine.train()
        # Seeding by update and rank makes dropout reproducible without saved generator state.
        torch.manual_seed(self._engine.global_steps << 20 | dist.rank())
        size, steps = self._cut.micro_batch_size, self._cut.accumulation_steps
        rows, weights = self._cut.fill(batch.to(self.device, non_blocking=True))
        total = torch.zeros((), device=self.device)
        self._clock.reset()
        for i, (micro_batch, weight) in enumerate(
            zip(rows.split(size), weights.split(size), strict=True)
        ):
            if i:  # DeepSpeed expects `step` after every `backward`, and updates at the last one
                self._engine.step()
            with self._clock:
                loss = (self.losses(micro_batch) * weight).mean()
            self._engine.backward(loss)
            total += loss.detach()
        return total / steps

    def trial(self, rows: torch.Tensor) -> None:
        """Compute the gradients of an update of two micro-batches, ``rows`` (2 n, T) int64 on each
        rank, and drop them; for an engine whose settings have two accumulation steps."""
        n, world_size = len(rows) // 2, self._cut.world_size
        self._cut = Cut(len(rows) * world_size, world_size, n, 2, n)
        self.backward(rows)
        self.skip()

    @property
    def forward_span(self) -> Span:
        """Device time of the forward passes of the last ``backward``; it includes waiting for other
        ranks where the stage needs them."""
        return self._clock.span

    @property
    def step_span(self) -> Span:
        """Device time of the last ``step``: norm, update, and the exchange of the weights."""
        return self._step_clock.span

    @property
    def overflow_is_normal(self) -> bool:
        """Whether non-finite gradients skip the update: fp16 with a dynamic loss scale."""
        return self._dynamic_scale

    @property
    def loss_scale(self) -> float:
        """The factor on the reduced gradients; 1 except in fp16."""
        return float(self._engine.optimizer.loss_scale) if self._dynamic_scale else 1.0

    def overflowed(self) -> bool:
        """Return whether a reduced gradient is not finite, which is normal now and then in fp16;
        always False in other precisions. Collective."""
        return self._dynamic_scale and not self._all_finite()

    def gradients_are_finite(self) -> bool:
        """Return whether all ranks' reduced gradients are finite; True in fp16. Collective."""
        return self._dynamic_scale or self._all_finite()

    def _all_finite(self) -> bool:
        flags = [torch.isfinite(gradient).all() for gradient in self.shards.gradients()]
        bad = torch.zeros((), device=self.shards.device)
        if flags:
            bad += (~torch.stack(flags).all()).float()
        return not bool(dist.all_reduce_sum(bad))

    def step(self, lr: float) -> torch.Tensor | float:
        """Clip the ticket's gradient and update the ticket. Returns the gradient's norm before
        clipping, over all ranks, without waiting for the device."""
        assert self._step is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._step_clock.reset()
        with self._step_clock:
            self._engine.step()
        norm: torch.Tensor | float = self._engine.get_global_grad_norm()
        return norm

    def skip(self) -> None:
        """Drop the gradients instead of ``step``; weights, moments and counters stay."""
        assert self._step is not None
        self._step.skipping = True
        self._engine.step()
        self._step.skipping = False

    def evaluate(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the losses of this rank's (B, T) int64 samples, (B,) fp32. Collective at stage 3:
        every rank passes equally many."""
        return self._without_gradients(batch, self.losses)

    def predict(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the objective's logits for this rank's (B, T) int64 samples, (B, ...). Collective
        at stage 3, like ``evaluate``."""
        return self._without_gradients(
            batch, lambda micro_batch: self._objective.logits(self._engine, micro_batch)
        )

    @torch.no_grad()
    def _without_gradients(
        self, batch: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        self._engine.eval()
        micro_batches = batch.to(self.device).split(self._cut.limit)
        return torch.cat([forward(micro_batch) for micro_batch in micro_batches])

    @property
    def state_bytes(self) -> int:
        """Bytes of ``local_state``, including padding of dense state."""
        optimizer = self.optimizer
        moment = 4 if optimizer.moment_format is FP32 else 2  # 8-bit ones are written in bf16
        master = 2 if optimizer.master == "split" else 4
        each = len(optimizer.moments) * moment + self._sixteen_bit * master
        return each * sum(s[optimizer.moments[0]].numel() for s in optimizer.state.values())

    def local_state(self) -> Collected:
        """Copy this rank's optimizer state; return a function that converts it to logical form."""
        return collect(self.optimizer, self.shards, self.mask, master=self._sixteen_bit)

    def counters(self) -> dict[str, float]:
        return {"optimizer_step": float(self.optimizer.num_updates), **self._scale_counters()}

    def restore(
        self, kinds: Iterable[str], read: Read, step: int, counters: dict[str, float]
    ) -> None:
        """Load the state of ``kinds`` after ``step`` updates, saved with the same mask; the model's
        weights are already those of that update."""
        restore(self.optimizer, self.shards, self.mask, kinds, read, master=self._sixteen_bit)
        for state in self.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], counters["optimizer_step"])
        self._place(step, counters)

    def close(self) -> None:
        """Free the engine and empty its model, so that this process can build another.
        Collective."""
        if self._measures_communication:  # DeepSpeed prints its table only on request
            deepspeed.comm.log_summary()
        self._engine.destroy()
        self.shards.free()
        vars(self.optimizer).clear()  # DeepSpeed's engine may live on, and holds it
        self._step = None  # it holds the others, and not every engine was armed
        del self._engine, self.shards, self.optimizer
        gc.collect()  # DeepSpeed leaves reference cycles
