"""Checkpoints of any DeepSpeed engine, with or without a ticket, as five functions.

    found = library.find("checkpoints")
    if found:
        library.load_weights(found, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    done = library.resume(engine, found) if found else 0
    for step in range(done + 1, steps + 1):
        ...
        library.save(engine, "checkpoints", step)
        library.prune("checkpoints", keep=3)

A run that is killed at any moment, even while it saves, resumes from the newest intact checkpoint:
bit by bit at the same number of ranks, and also at another number of ranks or ZeRO stage. The
optimizer must be element-wise (engine/portable.py). Learning rates and the state of the engine's
scheduler are restored too.
"""

from pathlib import Path
from typing import Any

import torch

from pmp_ds import dist
from pmp_ds.engine.portable import DenseEngine
from pmp_ds.run_dir import RunDir
from pmp_ds.state import checkpoint, shelf, weight_files
from pmp_ds.state.manifest import Position, verified
from pmp_ds.state.shelf import Found
from pmp_ds.state.state_reader import StateReader

_SCHEDULER, _RATES = "lr_scheduler", "lr"


def save(engine: Any, folder: Path | str, step: int, memory: dict[str, Any] | None = None) -> None:
    """Write the checkpoint of a DeepSpeed engine after ``step`` updates, with ``memory`` (JSON) for
    the caller. It appears whole, fsynced and read back, or not at all. Collective. Raises
    NotWrittenError on every rank."""
    run = RunDir(Path(folder))
    dist.on_rank0(run.create)
    memory = dict(memory or {})
    memory[_RATES] = [float(group["lr"]) for group in engine.optimizer.param_groups]
    if engine.lr_scheduler is not None:
        memory[_SCHEDULER] = engine.lr_scheduler.state_dict()
    position = Position(
        step=step,
        consumed_samples=step * engine.train_batch_size(),
        ticket_id=None,
        dataset_id="",
        val_loss=None,
        memory=memory,
    )
    checkpoint.save(run, DenseEngine(engine), position)


def find(folder: Path | str) -> Found | None:
    """Return the newest intact checkpoint as folder and position (``step``, ``memory``), or None if
    there is none yet. Newer damaged ones are reported and skipped. Raises UnreadableError when none
    is intact. Collective."""
    return dist.on_rank0(lambda: shelf.find(RunDir(Path(folder))))


def verify(found: Found) -> None:
    """Read every byte of a checkpoint. Raises DamagedError that names the file."""
    verified(found[0])


def load_weights(found: Found, model: torch.nn.Module) -> None:
    """Load a checkpoint's weights into ``model``, before an engine is built from it."""
    weight_files.load_weights(found[0] / "weights", model)


def resume(engine: Any, found: Found) -> int:
    """Restore moments, fp32 master weights, loss scale, learning rates and counters in an engine
    whose model has the checkpoint's weights. Returns the number of updates done."""
    folder, position = found
    reader = StateReader(folder)
    DenseEngine(engine).restore(reader.kinds, reader.read, position.step, position.counters)
    for group, rate in zip(engine.optimizer.param_groups, position.memory[_RATES], strict=True):
        group["lr"] = rate
    if engine.lr_scheduler is not None and _SCHEDULER in position.memory:
        engine.lr_scheduler.load_state_dict(position.memory[_SCHEDULER])
    return position.step


def prune(folder: Path | str, keep: int) -> None:
    """Delete all but the newest ``keep`` readable checkpoints. Collective."""
    dist.on_rank0(lambda: shelf.prune(RunDir(Path(folder)), "train", keep))
