"""The loop of updates, of masked pretraining (paper, section 2.2) as of fine-tuning; validation."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pmp_ds import dist
from pmp_ds.config import Config
from pmp_ds.data.blocks import Blocks
from pmp_ds.data.loader import BlockLoader
from pmp_ds.data.mixture import InTurn
from pmp_ds.engine.engine import Engine
from pmp_ds.errors import Stopped
from pmp_ds.log import MetricsLog
from pmp_ds.optim.schedule import learning_rate
from pmp_ds.progress import Progress
from pmp_ds.watch.guard import BadUpdateError, Guard
from pmp_ds.watch.stop import StopRequest
from pmp_ds.watch.watchdog import Watchdog

# (update, newest validation loss, whether it must be on disk on return): write a checkpoint
Save = Callable[[int, float | None, bool], None]
# What is measured on held-out data, by name; `val_loss` among it. Collective
Measure = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Watch:
    """What looks after every phase of a run."""

    log: MetricsLog
    stop: StopRequest
    dog: Watchdog
    channel: dist.SideChannel


def train(
    engine: Engine,
    loader: BlockLoader,
    measure: Measure,
    tokens_per_update: int,
    config: Config,
    watch: Watch,
    guard: Guard,
    bar: Progress,
    save: Save,
    done: int,
    val_loss: float | None,
) -> None:
    """The updates after ``done``, to ``config.train.steps``, of an armed engine. Raises Stopped
    when it was asked to stop, and UserError for what the guard does not let pass; either way all
    that is good is saved."""
    run, steps, log = config.run, config.train.steps, watch.log
    rates = _Rates(loader, tokens_per_update)
    if done == 0:
        measured = measure()
        val_loss = measured["val_loss"]
        log.write("train", 0, **measured)
    for step in range(done + 1, steps + 1):
        watch.dog.beat(f"update {step}")
        lr = learning_rate(config.train, step)
        loss = float(dist.all_reduce_sum(engine.backward(loader.next()))) / dist.world_size()
        try:
            apply = guard.admits(step, loss)
        except BadUpdateError:
            save(step - 1, val_loss, True)
            raise
        norm: Any = None
        if apply:
            norm = engine.step(lr)
            guard.applied(step, norm, engine.compute_seconds)
        else:
            engine.skip()
        rates.count()
        bar.update(1)
        if apply and (step % run.log_every == 0 or step == steps):
            log.write("train", step, loss=loss, lr=lr, grad_norm=float(norm), **rates.take(step))
            bar.set(loss=f"{loss:.3f}", lr=f"{lr:.1e}", val=val_loss and f"{val_loss:.3f}")
        if step % run.val_every == 0 or step == steps:
            measured = measure()
            val_loss = measured["val_loss"]
            log.write("train", step, **measured)
        reason = watch.stop.agreed() if step < steps else None
        if reason or step % run.checkpoint_every == 0 or step == steps:
            guard.settle()
            guard.check_drift(step)
            save(step, val_loss, reason is not None or step == steps)
        if reason:
            watch.stop.done()
            raise Stopped(
                f"{reason}: saved after update {step:,} of {steps:,}; the same command goes on"
            )


class _Rates:
    """Tokens per second and the loader's share of the time since the last record."""

    def __init__(self, loader: BlockLoader, tokens_per_update: int) -> None:
        self._loader, self._tokens, self._updates = loader, tokens_per_update, 0
        self._clock, self._waited = time.perf_counter(), loader.wait_seconds

    def count(self) -> None:
        self._updates += 1

    def take(self, step: int) -> dict[str, float]:
        seconds = time.perf_counter() - self._clock
        waited = self._loader.wait_seconds - self._waited
        values = {
            "tokens": step * self._tokens,
            "tokens_per_second": self._updates * self._tokens / seconds,
            "loader_share": waited / seconds,
        }
        self._clock, self._waited = time.perf_counter(), self._loader.wait_seconds
        self._updates = 0
        return values


def validate(engine: Engine, blocks: Blocks | InTurn, num_blocks: int) -> float:
    """Mean loss in nats per token of the first ``num_blocks`` blocks, shared out over the ranks.

    Every rank evaluates equally many (stage 3 gathers weights in step); surplus ones weigh 0.
    """
    total = min(num_blocks, len(blocks))
    share = -(-total // dist.world_size())
    indices = np.arange(dist.rank() * share, (dist.rank() + 1) * share)
    batch = torch.from_numpy(blocks.gather(np.minimum(indices, total - 1)).astype(np.int64))
    losses = engine.evaluate(batch).double()
    weights = torch.from_numpy(indices < total).to(losses)
    return float(dist.all_reduce_sum((losses * weights).sum())) / total
