"""The main job: theta(0), the ticket, rewind, masked pretraining; resumes after an interruption.

Rewind needs no step of its own: discovery and masked pretraining each build their engine from
theta(0), so weights, optimizer state, schedule and data position of the warm-up cannot reach the
result.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pmp_ds import dist, startup, verbosity
from pmp_ds.config import Config
from pmp_ds.data.mixed_store import Dataset
from pmp_ds.data.verified import check_together
from pmp_ds.discover.discover import Discovery, draw_ticket
from pmp_ds.engine.engine import Engine
from pmp_ds.model.parameters import digest, num_params
from pmp_ds.run_dir import RunDir
from pmp_ds.state import plain_weights, run_record, shelf
from pmp_ds.state.shelf import Found
from pmp_ds.ticket.shared import load_together
from pmp_ds.ticket.ticket import Ticket, has_ticket, load_ticket, save_ticket
from pmp_ds.train import micro_batch, plan, planned, start
from pmp_ds.train.job import Job, open_job
from pmp_ds.train.loop import train, validate
from pmp_ds.train.session import Extra, Session
from pmp_ds.watch.held import held
from pmp_ds.watch.watch import watching


def _obtain_ticket(job: Job, found: Found | None, session: Session) -> Ticket | None:
    """Return the run's ticket, or None for ``mask.source: none``. A missing ticket is discovered
    (resuming from ``found``), drawn or copied, and saved."""
    mask, folder = job.config.mask, job.run.ticket
    if mask.source == "none":
        return None
    if not dist.on_rank0(lambda: has_ticket(folder)):
        if mask.source == "file":
            assert mask.file is not None
            given = Path(mask.file)
            fitting = digest(job.table)
            dist.on_rank0(lambda: save_ticket(load_ticket(given, model_digest=fitting), folder))
        elif mask.source == "random":
            draw_ticket(job.key("random mask"), mask, job.table).save(folder)
        else:
            _discover(job, found, session)
    dist.on_rank0(lambda: shelf.prune(job.run, "discover", 0))
    return load_together(folder, model_digest=digest(job.table))


def _discover(job: Job, found: Found | None, session: Session) -> None:
    """Run discovery to its end, resuming from ``found``, and save the ticket."""
    config, watch = job.config, session.watch
    work = job.work("discover", job.warm_up_order(), config.mask.max_steps)
    with session.training(work, found) as training:
        discovery = Discovery(training.engine, config, job.table, job.key("random fraction"))
        if training.begin and training.reader:
            discovery.restore(training.reader, training.begin)
            _say(f"resuming discovery after update {discovery.step:,}")
        training.extra = lambda: Extra(*discovery.snapshot())
        while not discovery.over:
            watch.dog.beat(f"update {discovery.step + 1} of discovery")
            loss, iou = discovery.update(training.loader.next())
            asked = torch.full_like(loss, watch.stop.asked())
            total, asking = dist.all_reduce_sum(torch.stack([loss, asked])).tolist()
            step, mean = discovery.step, total / dist.world_size()
            training.record(step, loss=mean, **({} if iou is None else {"iou": iou}))
            training.started()
            training.bar.set(loss=f"{mean:.3f}", iou="-" if iou is None else f"{iou:.4f}")
            training.bar.update(1)
            if asking or (step % config.run.checkpoint_every == 0 and not discovery.over):
                training.save(step, must=asking > 0)
            if asking:
                training.stop(step)
        discovery.ticket().save(job.run.ticket)


@dataclass(frozen=True)
class Outcome:
    """The result of a finished run."""

    num_params: int
    num_kept: int  # counted in the ticket
    complement_changed: int


def run(
    config: Config,
    ds_config: dict[str, Any],
    store: Dataset,
    folder: RunDir,
    started: float,
    *,
    start_afresh: bool = False,
) -> Outcome:
    """Begin or resume the run in ``folder`` and complete it.

    ``started`` is the start of this process in monotonic seconds. With ``start_afresh``, unreadable
    checkpoints are set aside and the run begins at update 0. Raises Stopped after a stop request.
    """
    with held(folder.root, f"the run's folder {folder.root}"):
        check_together(store, folder.verified)  # a damaged store stops all ranks first
        dist.on_rank0(lambda: run_record.claim(folder, config, store))
        startup.passed("data")
        job = open_job(config, ds_config, store, folder)
        startup.passed("theta(0)")
        dist.on_rank0(lambda: _say(f"{config.run.name}:\n{plan.describe(job)}"))
        return pretrain(job, started, start_afresh=start_afresh)


def pretrain(job: Job, started: float, *, start_afresh: bool = False) -> Outcome:
    """Complete a job whose folder is held and claimed, as in ``run``."""
    config, run = job.config, job.run
    # Write nothing until every check that can refuse this start has passed.
    trained = start.look(job, "train", start_afresh)
    has_one = dist.on_rank0(lambda: has_ticket(run.ticket))
    explored = start.NOTHING if has_one else start.look(job, "discover", start_afresh)
    found, discovered = trained.found, explored.found
    step = found[1].step if found else 0
    if found is None and job.initial.base is not None:
        job.initial.base.require(f"{run.root} has no checkpoint of masked pretraining to resume")
    # Records of updates that will be repeated are superseded.
    last = {"train": step} if step else {}
    if has_one:
        last["discover"] = config.mask.max_steps
    elif discovered:
        last["discover"] = discovered[1].step
    ended = step == config.train.steps
    dist.on_rank0(lambda: start.go_on(job, [trained, explored], None if ended else last))
    if ended:
        _say(f"already finished: {step:,} of {step:,} updates")
        return _outcome(job)
    before = planned.resident()
    with watching(run, config.run.max_seconds, config.guard.hang_seconds, started) as watch:
        job = micro_batch.fitted(job)
        dist.on_rank0(lambda: planned.remember(job, before))
        with Session(run, job.config, job.ds_config, watch) as session:
            ticket = _obtain_ticket(job, discovered, session)
            startup.passed("ticket")
            _train(job, ticket, found, session)
    return _outcome(job)


def _train(job: Job, ticket: Ticket | None, found: Found | None, session: Session) -> None:
    """Train on the ticket to the end, from theta(0) or from ``found``."""
    config = job.config

    def measure(engine: Engine) -> dict[str, float]:
        blocks = job.store.split("validation")
        return {"val_loss": validate(engine, blocks, config.run.val_blocks)}

    work = job.work("train", config.data.seed, config.train.steps, ticket, measure)
    with session.training(work, found) as training:
        if training.done:
            _say(f"resuming after update {training.done:,} of {config.train.steps:,}")
        train(training)


def _say(text: str) -> None:
    if dist.rank() == 0 and verbosity.informs():
        print(text, flush=True)


def _outcome(job: Job) -> Outcome:
    """Count in the files of the ticket and of the last checkpoint, which all ranks share.
    Collective."""
    d = num_params(job.table)
    if job.config.mask.source == "none":
        return Outcome(d, d, 0)
    if (base := job.initial.base) is not None:
        base.require(
            f"all {job.config.train.steps:,} updates are saved, but that nothing outside the "
            "ticket changed is counted by comparison with it"
        )
    weights = dist.on_rank0(lambda: plain_weights.of_checkpoint(job.run, job.config.train.steps))

    mask = load_together(job.run.ticket, model_digest=digest(job.table)).mask
    part = dist.rank(), dist.world_size()
    changed = dist.together(
        lambda: plain_weights.complement_changes(weights, job.initial, mask, part), patient=True
    )
    return Outcome(d, mask.num_kept, sum(dist.all_gather_object(changed)))
