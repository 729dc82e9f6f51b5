"""The main job: theta(0), the ticket, rewind, masked pretraining. Resumes where it was.

Rewind is by construction: discovery and masked pretraining each build their engine from theta(0),
so weights, optimizer state, schedule and data position of the warm-up cannot reach the result.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmp_ds import dist
from pmp_ds.config import Config
from pmp_ds.data.mixed_store import Dataset
from pmp_ds.data.verified import check_together
from pmp_ds.discover.discover import Discovery, random_ticket
from pmp_ds.errors import Stopped
from pmp_ds.log import MetricsLog
from pmp_ds.model.parameters import digest, num_params
from pmp_ds.model.secret_init import derive
from pmp_ds.progress import Progress
from pmp_ds.run_dir import RunDir
from pmp_ds.state import checkpoint, plain_weights, run_record, shelf, weight_files
from pmp_ds.state.saver import Saver
from pmp_ds.state.shelf import Found
from pmp_ds.ticket.ticket import Ticket, has_ticket, load_ticket, save_ticket
from pmp_ds.train import plan, start
from pmp_ds.train.job import Job, open_job
from pmp_ds.train.loop import Watch, train, validate
from pmp_ds.watch.guard import Guard
from pmp_ds.watch.held import held
from pmp_ds.watch.stop import StopRequest
from pmp_ds.watch.watchdog import Watchdog


def _obtain_ticket(job: Job, found: Found | None, watch: Watch, saver: Saver) -> Ticket | None:
    """The run's ticket: read when it is there, else found (by a discovery that goes on after
    ``found``), drawn or copied, and saved. None for ``mask.source: none``."""
    mask, folder = job.config.mask, job.run.ticket
    if mask.source == "none":
        return None
    if not dist.on_rank0(lambda: has_ticket(folder)):
        if mask.source == "file":
            assert mask.file is not None
            given = Path(mask.file)
            ticket = dist.together(lambda: load_ticket(given, model_digest=digest(job.table)))
        elif mask.source == "random":
            ticket = random_ticket(job.key("random mask"), mask, job.table)
        else:
            ticket = _discover(job, found, watch, saver)
        dist.on_rank0(lambda: save_ticket(ticket, folder))
    dist.on_rank0(lambda: shelf.prune(job.run, "discover", 0))
    return dist.together(lambda: load_ticket(folder, model_digest=digest(job.table)))


def _discover(job: Job, found: Found | None, watch: Watch, saver: Saver) -> Ticket:
    """Run discovery, or resume it after ``found``, to its end."""
    config = job.config
    secret = derive(job.init, "warm-up order") if isinstance(job.init, bytes) else job.init
    model = job.fresh_model()
    if found:
        weight_files.load_weights(found[0] / "weights", model)
    engine = job.engine(model)
    discovery = Discovery(engine, config, job.table, job.key("random fraction"))
    if found:
        discovery.restore(checkpoint.load_state(found[0], engine, None, found[1]), found[1])
        _say(f"resuming discovery after update {discovery.step:,}")

    def save(must: bool) -> None:
        more, masks, memory = discovery.snapshot()
        position = checkpoint.Position(
            phase="discover",
            step=discovery.step,
            consumed_samples=discovery.step * config.train.global_batch_size,
            ticket_id=None,
            dataset_id=job.store.dataset_id,
            val_loss=None,
            memory=memory,
        )
        watch.stop.saved(saver.save(engine, None, position, more=more, masks=masks, must=must))

    consumed = discovery.step * config.train.global_batch_size
    with (
        job.loader("discover", secret, consumed) as loader,
        Progress("discover", "update", config.mask.max_steps, initial=discovery.step) as bar,
    ):
        while not discovery.over:
            watch.dog.beat(f"update {discovery.step + 1} of discovery")
            loss, iou = discovery.update(loader.next())
            step = discovery.step
            watch.log.write("discover", step, loss=loss, **({} if iou is None else {"iou": iou}))
            bar.set(loss=f"{loss:.3f}", iou="-" if iou is None else f"{iou:.4f}")
            bar.update(1)
            reason = watch.stop.agreed()
            if reason or (step % config.run.checkpoint_every == 0 and not discovery.over):
                save(reason is not None)
            if reason:
                watch.stop.done()
                raise Stopped(
                    f"{reason}: saved after update {step:,} of discovery; the same command goes on"
                )
    ticket = discovery.ticket()
    engine.close()
    saver.wait()
    return ticket


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

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
    """Begin or resume the run in ``folder`` and lead it to its end.

    ``started``: when this process did, monotonic seconds. With ``start_afresh`` checkpoints of
    which none can be read are set aside, and the run begins at update 0. Raises Stopped when it was
    asked to stop before its end.
    """
    with held(folder.root, f"the run's folder {folder.root}"):
        check_together(store, folder.verified)  # a damaged store stops all ranks first
        dist.on_rank0(lambda: run_record.claim(folder, config, store))
        job = open_job(config, ds_config, store, folder)
        _say(f"{config.run.name}:\n{plan.describe(job)}")
        return pretrain(job, started, start_afresh=start_afresh)


def pretrain(job: Job, started: float, *, start_afresh: bool = False) -> Outcome:
    """``run`` for a job whose folder is held and claimed."""
    config, run = job.config, job.run
    # Nothing is written before all that can refuse this start.
    trained = start.look(job, "train", start_afresh)
    has_one = dist.on_rank0(lambda: has_ticket(run.ticket))
    explored = start.NOTHING if has_one else start.look(job, "discover", start_afresh)
    found, discovered = trained.found, explored.found
    step = found[1].step if found else 0
    # The records of what will be done again are dropped.
    last = {"train": step} if step else {}
    if has_one:
        last["discover"] = config.mask.max_steps
    elif discovered:
        last["discover"] = discovered[1].step
    dist.on_rank0(lambda: start.go_on(job, [trained, explored], last))
    if step == config.train.steps:
        _say(f"already finished: {step:,} of {step:,} updates")
        return dist.on_rank0(lambda: _outcome(job))
    log = MetricsLog(run, enabled=dist.rank() == 0)
    saver = Saver(run, config, log)
    saver.newest = found[1].name if found else None
    with (
        contextlib.closing(log),
        dist.SideChannel() as channel,
        StopRequest(config.run.max_seconds, started, channel) as stop,
        Watchdog(run, config.guard.hang_seconds) as dog,
        contextlib.closing(saver),
    ):
        watch = Watch(log, stop, dog, channel)
        ticket = _obtain_ticket(job, discovered, watch, saver)
        _train(job, ticket, found, watch, saver)
    return dist.on_rank0(lambda: _outcome(job))


def _train(
    job: Job, ticket: Ticket | None, found: Found | None, watch: Watch, saver: Saver
) -> None:
    config, batch = job.config, job.config.train.global_batch_size
    mask, ticket_id = (ticket.mask, ticket.id) if ticket else (None, None)
    model = job.fresh_model()
    if found:
        weight_files.load_weights(found[0] / "weights", model)
    engine = job.engine(model)
    engine.arm(mask)
    begin = found[1] if found else None
    if found:
        checkpoint.load_state(found[0], engine, mask, found[1])
        _say(f"resuming after update {found[1].step:,} of {config.train.steps:,}")
    guard = Guard(
        config.guard, engine, watch.log, watch.stop, watch.channel, begin.memory if begin else {}
    )
    guard.compare_tickets(ticket_id)

    def save(step: int, val_loss: float | None, must: bool) -> None:
        position = checkpoint.Position(
            step=step,
            consumed_samples=step * batch,
            ticket_id=ticket_id,
            dataset_id=job.store.dataset_id,
            val_loss=val_loss,
            memory=dict(guard.memory),
        )
        if step and position.name != saver.newest:
            watch.stop.saved(saver.save(engine, mask, position, must=must))

    def measure() -> dict[str, float]:
        blocks = job.store.split("validation")
        return {"val_loss": validate(engine, blocks, config.run.val_blocks)}

    done = begin.step if begin else 0
    with (
        job.loader("train", config.data.seed, done * batch) as loader,
        Progress("train", "update", config.train.steps, initial=done) as bar,
    ):
        train(
            engine, loader, measure, batch * job.store.block_size, config, watch, guard, bar, save,
            done, begin.val_loss if begin else None,
        )  # fmt: skip
    engine.close()


def _say(text: str) -> None:
    if dist.rank() == 0:
        print(text, flush=True)


def _outcome(job: Job) -> Outcome:
    """Counted in the files of the ticket and the last checkpoint themselves; rank 0 alone."""
    d = num_params(job.table)
    if job.config.mask.source == "none":
        return Outcome(d, d, 0)
    ticket = load_ticket(job.run.ticket, model_digest=digest(job.table))
    weights = plain_weights.of_checkpoint(job.run, job.config.train.steps)
    changed = plain_weights.complement_changes(weights, job.fresh_model(), ticket.mask)
    return Outcome(d, ticket.mask.num_kept, changed)
