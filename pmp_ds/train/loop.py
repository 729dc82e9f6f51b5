"""Stage II of the method: masked pretraining (paper, section 2.2). The loop, and validation."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pmp_ds import dist
from pmp_ds.config import Config
from pmp_ds.data.arrow_store import Blocks
from pmp_ds.data.loader import BlockLoader
from pmp_ds.data.mixture import InTurn
from pmp_ds.errors import UserError
from pmp_ds.log import MetricsLog
from pmp_ds.optim.schedule import learning_rate
from pmp_ds.progress import Progress
from pmp_ds.train.engine import Engine

# (update, validation loss or None): write a checkpoint
Save = Callable[[int, float | None], None]


def train(
    engine: Engine,
    loader: BlockLoader,
    validation: Blocks | InTurn,
    config: Config,
    log: MetricsLog,
    bar: Progress,
    save: Save,
    first: int,
) -> None:
    """Updates ``first`` to ``config.train.steps`` of an armed engine; ``log``, ``bar`` and
    ``save`` hear of them. Raises UserError when the loss is no longer finite."""
    run, steps = config.run, config.train.steps
    tokens_per_update = config.train.global_batch_size * validation.block_size
    val_loss: float | None = None
    if first == 1:
        val_loss = validate(engine, validation, run.val_blocks)
        log.write("train", 0, val_loss=val_loss)
    clock, waited, done = time.perf_counter(), loader.wait_seconds, first - 1
    for step in range(first, steps + 1):
        lr = learning_rate(config.train, step)
        loss = engine.backward(loader.next())
        norm = engine.step(lr)
        bar.update(1)
        if step % run.log_every == 0 or step == steps:
            mean_loss = float(dist.all_reduce_sum(loss)) / dist.world_size()
            if not np.isfinite(mean_loss):
                raise UserError(
                    f"the training loss is {mean_loss} at update {step}: lower train.lr or "
                    "lengthen train.warmup_steps; the last checkpoint is intact"
                )
            seconds = time.perf_counter() - clock
            record: dict[str, Any] = {
                "loss": mean_loss,
                "lr": lr,
                "grad_norm": float(norm),
                "tokens": step * tokens_per_update,
                "tokens_per_second": (step - done) * tokens_per_update / seconds,
                "loader_share": (loader.wait_seconds - waited) / seconds,
            }
            log.write("train", step, **record)
            bar.set(loss=f"{mean_loss:.3f}", lr=f"{lr:.1e}", val=val_loss and f"{val_loss:.3f}")
            clock, waited, done = time.perf_counter(), loader.wait_seconds, step
        if step % run.val_every == 0 or step == steps:
            val_loss = validate(engine, validation, run.val_blocks)
            log.write("train", step, val_loss=val_loss)
        if step % run.checkpoint_every == 0 or step == steps:
            save(step, val_loss)


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
