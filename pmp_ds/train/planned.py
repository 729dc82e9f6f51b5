"""What a start plans, for `report.html` to compare with what was measured: `plan.json`.

It holds what `pretrain --dry-run` prints, on the machine that trains. Sizes are in bytes, memory is
that of rank 0.
"""

import psutil

from pmp_ds import dist
from pmp_ds.config.precision import precision_of
from pmp_ds.errors import UserError
from pmp_ds.model.parameters import constants
from pmp_ds.run_dir import write_json
from pmp_ds.train import phases
from pmp_ds.train.activations import Timeline, timeline
from pmp_ds.train.job import Job
from pmp_ds.train.plan import budget_of


def resident() -> int:
    """Return the bytes of host memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def write(job: Job, before: int) -> None:
    """Write the plan of ``job``, whose micro-batch is a number; rank 0 alone. ``before``: what was
    ``resident`` when only Python, torch and other libraries were there."""
    budget, on_device = budget_of(job), dist.device().type
    counted = _timeline(job, on_device)
    device = {name: sum(one.values()) for name, one in phases.on_device(budget, counted).items()}
    whole = job.initial.reason is not None
    host = {name: sum(phases.host(budget, name, drawn_whole=whole).values()) for name in device}
    if on_device == "cpu":
        host = {name: host[name] + device[name] for name in device}
    buffers = sum(buffer.nbytes for buffer in constants(job.initial.model()).values())
    updates = job.config.train.steps
    plan = {
        "ranks": budget.world,
        "updates": updates,
        "tokens": updates * job.config.train.global_batch_size * job.store.block_size,
        "device_memory": None if on_device == "cpu" else device["training"],
        "host_memory": before + max(host.values()),
        "host_memory_before": before,
        "activations_counted": counted is not None,
        "checkpoint": budget.checkpoint(buffers),
        "release": budget.release(buffers),
    }
    try:
        write_json(job.run.plan, plan)
    except OSError as error:
        raise UserError(f"{job.run.plan} cannot be written: {error}") from None


def _timeline(job: Job, on_device: str) -> Timeline | None:
    """Return the memory of activations, or None where the model cannot run without values."""
    if job.initial.reason is not None:
        return None
    train = job.config.train
    try:
        return timeline(
            job.initial.model(),
            train,
            job.store.block_size,
            precision_of(train).dtype,
            on_device,
        )
    except Exception:  # noqa: BLE001 - whatever a model of any family does
        return None
