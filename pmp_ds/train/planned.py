"""The plan of a run that was started, for `report.html` to compare with what was measured.

A start writes what it runs on to `machine.json`; ``plan_of`` then computes what `pretrain
--dry-run` prints for it. Sizes are in bytes, memory is that of rank 0.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil

from pmp_ds import dist
from pmp_ds.config import Config
from pmp_ds.engine.deepspeed_config import merge
from pmp_ds.errors import UserError, require
from pmp_ds.fields import fit
from pmp_ds.foreign import ForeignError, read_object
from pmp_ds.run_dir import RunDir, write_json
from pmp_ds.state import theta0
from pmp_ds.state.run_record import load_config, read_data
from pmp_ds.train import dry_run, phases
from pmp_ds.train.budget import Budget
from pmp_ds.train.job import Job, given_ticket

_MOST_RANKS = 1 << 20


def resident() -> int:
    """Return the bytes of host memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True, kw_only=True)
class Started:
    """What a start runs on; saved as machine.json."""

    ranks: int
    device: str
    """`cuda` or `cpu`."""
    micro_batch_size: int
    deepspeed: dict[str, Any]
    """The JSON."""
    host_memory_before: int
    """Of Python and the libraries."""


def remember(job: Job, before: int) -> None:
    """Write what ``job``, whose micro-batch is a number, runs on; rank 0 alone. ``before``: what
    was ``resident`` before the model."""
    size = job.config.train.micro_batch_size
    assert isinstance(size, int)
    started = Started(
        ranks=dist.world_size(),
        device=dist.device().type,
        micro_batch_size=size,
        deepspeed=job.ds_config,
        host_memory_before=before,
    )
    try:
        write_json(job.run.machine, asdict(started))
    except OSError as error:
        raise UserError(f"{job.run.machine} cannot be written: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the last start of a run planned."""

    started: Started
    updates: int
    tokens: int
    device_memory: int | None
    """In an update, on a GPU."""
    host_memory: int
    """At most, with that of Python and the libraries."""
    has_activations: bool
    """Whether they are in the numbers: some models do not run without values."""
    checkpoint: int
    release: int


def plan_of(run: RunDir) -> Plan | None:
    """Return the plan, or None without ``started_of``. Raises UserError when ``run`` is not a
    run."""
    config = load_config(run)
    started = started_of(run, config)
    if started is None:
        return None
    train = replace(config.train, micro_batch_size=started.micro_batch_size)
    config, data = replace(config, train=train), read_data(run)
    shape = dry_run.shape_of(
        config,
        started.deepspeed,
        started.ranks,
        theta0.architecture(config, data, run),
        data.block_size,
        given_ticket(config, run),
        on_cpu=started.device == "cpu",
    )
    budget, full = shape.budget, train.activation_checkpointing == "full"
    counted = dry_run.timelines(shape, (full,), started.device)[0][full]
    device = {name: sum(one.values()) for name, one in phases.on_device(budget, counted).items()}
    whole = shape.reason is not None
    host = {name: sum(phases.host(budget, name, drawn_whole=whole).values()) for name in device}
    if budget.on_cpu:
        if config.run.async_save:  # training goes on
            device["save"] = device["training"]
        host = {name: host[name] + device[name] + _of_products(budget) for name in device}
    return Plan(
        started=started,
        updates=train.steps,
        tokens=train.steps * train.global_batch_size * data.block_size,
        device_memory=None if budget.on_cpu else device["training"],
        host_memory=started.host_memory_before + max(host.values()),
        has_activations=counted is not None,
        checkpoint=budget.checkpoint(shape.buffers),
        release=budget.release(shape.buffers),
    )


def _of_products(budget: Budget) -> int:
    """Return what torch's product of 16-bit matrices takes on the CPU: its result in fp32, which is
    at most the gradient of the largest parameter."""
    return 4 * budget.largest if budget.element == 2 else 0


def started_of(run: RunDir, config: Config) -> Started | None:
    """Return what the last start ran on, or None where an older version made it, or somebody
    changed the file since."""
    try:
        found: Started = fit(Started, read_object(run.machine), run.machine)
        require(0 < found.ranks <= _MOST_RANKS, "ranks")
        require(found.micro_batch_size > 0, "micro_batch_size")
        train = replace(config.train, micro_batch_size=found.micro_batch_size)
        merge(found.deepspeed, train, found.ranks)
    except (ForeignError, UserError):
        return None
    return found
