"""The training loop of masked pretraining (paper, section 2.2) and fine-tuning, and validation.

The host runs ahead of the device: it judges and records the numbers of one update while the device
computes the next. It waits only before it measures or saves (and in every update if
``Guard.waits``).
"""

import time

import numpy as np
import torch

from pmp_ds import dist
from pmp_ds.data.blocks import Blocks
from pmp_ds.data.mixture import InTurn
from pmp_ds.engine.clock import Later, Span
from pmp_ds.engine.engine import Engine
from pmp_ds.engine.figures import flops_per_token, peak_flops, peak_memory
from pmp_ds.optim.schedule import learning_rate
from pmp_ds.train.session import Training
from pmp_ds.watch.guard import BadUpdateError


def train(training: Training) -> None:
    """Make the remaining updates of a work. Raises Stopped after a stop request, and UserError for
    an update that the guard rejects; both save all good updates first."""
    run, steps, guard = training.config.run, training.work.steps, training.guard
    rates = _Rates(training)
    if training.done == 0:
        training.measure(0)
    ahead: _Update | None = None  # launched but not settled
    for step in range(training.done + 1, steps + 1):
        training.watch.dog.beat(f"update {step}")
        training.profile.begin(step)
        update = _Update(training, step)
        asked = ahead.settle(rates) if ahead else False
        try:
            update.finish(apply=not guard.waits or guard.admits(step, update.loss))
        except BadUpdateError:
            training.save(step - 1, must=True)
            raise
        ahead = update
        measures = step % run.val_every == 0 or step == steps
        saves = step % run.checkpoint_every == 0 or step == steps
        if asked or measures or saves:
            asked |= update.settle(rates)
            ahead = None
        stops = asked and step < steps
        if stops or saves or step % training.config.guard.drift_every == 0:
            guard.check_drift(step)
        if measures:
            training.measure(step)
        if stops or saves:
            training.save(step, must=stops or step == steps)
        if stops:
            training.stop(step)


class _Update:
    """An update that the host launches, and judges once its numbers have arrived."""

    def __init__(self, training: Training, step: int) -> None:
        """Launch the computation of the gradients."""
        self._training, self._engine, self.step = training, training.engine, step
        self.lr = learning_rate(training.config.train, step)
        loss = self._engine.backward(training.loader.next())
        asked = torch.full_like(loss, training.watch.stop.asked())
        self._report = Later(dist.all_reduce_sum(torch.stack([loss, asked])))
        self._forward = self._engine.forward_span
        self._norm: Later | None = None
        self._stepping: Span | None = None

    def finish(self, *, apply: bool) -> None:
        if not apply:
            self._engine.skip()
            return
        norm = self._engine.step(self.lr)  # a number, or a tensor that may not be computed yet
        self._stepping = self._engine.step_span
        exact = norm if isinstance(norm, torch.Tensor) else torch.tensor(norm, dtype=torch.float64)
        self._norm = Later(exact)

    @property
    def loss(self) -> float:
        """The mean loss over the ranks; reading it waits for the device."""
        return self._report.read()[0] / dist.world_size()

    def settle(self, rates: "_Rates") -> bool:
        """Wait for the numbers, judge and record them; return whether all ranks must stop.
        Collective."""
        training, config = self._training, self._training.config
        stop = self._report.read()[1] > 0
        rates.count(self._stepping.read() if self._stepping else 0.0)
        training.started()
        training.bar.update(1)
        if self._norm is None:  # not applied
            return stop
        norm = self._norm.read()[0]
        stop |= training.guard.judge(self.step, self.loss, norm, self._forward.read())
        if self.step % config.run.log_every == 0 or self.step == training.work.steps:
            numbers = {"loss": self.loss, "lr": self.lr, "grad_norm": norm}
            training.record(self.step, **numbers, **rates.take(self.step))
            val = training.val_loss and f"{training.val_loss:.3f}"
            training.bar.set(loss=f"{self.loss:.3f}", lr=f"{self.lr:.1e}", val=val)
        return stop


class _Rates:
    """Tokens per second, the shares of the loader and the optimizer in the time, and what a GPU
    made of it, since the last record."""

    def __init__(self, training: Training) -> None:
        self._loader, self._tokens = training.loader, training.tokens_per_update
        engine, block = training.engine, round(training.work.tokens_per_sample)
        flops = flops_per_token(engine.hf_config, engine.num_params, block)
        peak = peak_flops(engine.device, engine.dtype)
        self._flops = None if peak is None else flops / peak / dist.world_size()
        self._device = engine.device
        self._updates, self._stepping = 0, 0.0
        self._clock, self._waited = time.perf_counter(), self._loader.wait_seconds

    def count(self, step_seconds: float) -> None:
        self._updates += 1
        self._stepping += step_seconds

    def take(self, step: int) -> dict[str, float]:
        seconds = time.perf_counter() - self._clock
        waited = self._loader.wait_seconds - self._waited
        values = {
            "tokens": step * self._tokens,
            "tokens_per_second": self._updates * self._tokens / seconds,
            "loader_share": waited / seconds,
            "optimizer_share": self._stepping / seconds,
            **peak_memory(self._device),
        }
        if self._flops is not None:
            values["mfu"] = values["tokens_per_second"] * self._flops
        self._clock, self._waited = time.perf_counter(), self._loader.wait_seconds
        self._updates, self._stepping = 0, 0.0
        return values


def validate(engine: Engine, blocks: Blocks | InTurn, num_blocks: int) -> float:
    """Return the mean loss in nats per token of the first ``num_blocks`` blocks, over all ranks.

    Every rank evaluates equally many, because stage 3 gathers weights in step; surplus blocks have
    weight 0.
    """
    total = min(num_blocks, len(blocks))
    share = -(-total // dist.world_size())
    indices = np.arange(dist.rank() * share, (dist.rank() + 1) * share)
    batch = torch.from_numpy(blocks.gather(np.minimum(indices, total - 1)).astype(np.int64))
    losses = engine.evaluate(batch).double()
    weights = torch.from_numpy(indices < total).to(losses)
    return float(dist.all_reduce_sum((losses * weights).sum())) / total
