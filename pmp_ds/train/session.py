"""A run's folder during training, in pretraining and fine-tuning.

    with Session(run, config, ds_config, watch) as session:
        with session.training(work, found) as training:
            train(training)  # loop.py

A *work* describes a phase of a run. A *training* is that phase in progress: an engine at the
current update, with its batches, its guard and the state that a checkpoint saves.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pmp_ds import dist, startup, verbosity
from pmp_ds.config import Config
from pmp_ds.data.loader import BlockLoader
from pmp_ds.engine.engine import Engine
from pmp_ds.engine.objective import Objective
from pmp_ds.engine.placement import Fill
from pmp_ds.errors import EXIT_MISTAKE, EXIT_REQUEUE, Stopped, UserError
from pmp_ds.log.sinks import sinks_of
from pmp_ds.log.writer import MetricsLog
from pmp_ds.progress import Progress
from pmp_ds.run_dir import RunDir
from pmp_ds.state import checkpoint, weight_files
from pmp_ds.state.manifest import Phase, Position
from pmp_ds.state.saver import Saver
from pmp_ds.state.shelf import Found
from pmp_ds.state.state_reader import StateReader
from pmp_ds.ticket.mask import ParamMask
from pmp_ds.train.profile import Profile
from pmp_ds.watch.guard import Guard
from pmp_ds.watch.watch import Watch

Measure = Callable[[Engine], dict[str, float]]
"""Measures on held-out data; returns values by name, including `val_loss`. Collective."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A phase of training, the same on every rank."""

    phase: Phase = "train"
    name: str
    """The name on the progress bar."""
    model: Any
    """The model at its first weights, fp32 on CPU: a PreTrainedModel, possibly inside peft's. Or
    its parameters are on the meta device, and their first values those of ``fill``."""
    fill: Fill | None = None
    mask: ParamMask | None = None
    """The elements to train; None: all trainable ones."""
    mask_id: str | None = None
    objective: Objective
    samples: Any
    """The source that BlockLoader reads."""
    order: bytes
    """The key of the sample order, 32 bytes."""
    dataset_id: str
    tokens_per_sample: float
    steps: int
    """Number of updates at the end of the phase."""
    measure: Measure | None = None

    def loader(self, global_batch_size: int, consumed_samples: int) -> BlockLoader:
        """Return this rank's share of the samples after the first ``consumed_samples``."""
        return BlockLoader(
            self.samples,
            self.order,
            global_batch_size,
            dist.rank(),
            dist.world_size(),
            consumed_samples,
            pin_memory=dist.device().type == "cuda",
        )


@dataclass
class Extra:
    """State that a phase saves besides weights and optimizer state: its memory, and in discovery
    this rank's share of running scores and candidate masks."""

    more: checkpoint.Tensors = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


class Session:
    """A context with the records and checkpoints of one run folder, for one work after another."""

    def __init__(
        self, run: RunDir, config: Config, ds_config: dict[str, Any], watch: Watch
    ) -> None:
        self.config, self.ds_config, self.watch = config, ds_config, watch
        self.run = run
        self.log = MetricsLog(
            run, enabled=dist.rank() == 0, sinks=lambda starts: sinks_of(run, config, starts)
        )
        self.saver = Saver(run, config, self.log)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.saver.close()
        self.log.close(_code(kind))

    @contextlib.contextmanager
    def training(self, work: Work, found: Found | None) -> Iterator["Training"]:
        """Begin ``work``, or resume it from checkpoint ``found``. Collective."""
        training = Training(self, work, found)
        try:
            with training.loader, training.bar, contextlib.closing(training.profile):
                yield training
            self.saver.wait()
        except UserError:  # on every rank, as one of the guard: other work may follow
            training.engine.close()
            raise
        training.engine.close()


def _code(kind: type[BaseException] | None) -> int | None:
    """Return the exit code of a session that such an exception ends; None for a fault."""
    if kind is None:
        return 0
    if issubclass(kind, Stopped):
        return EXIT_REQUEUE
    return EXIT_MISTAKE if issubclass(kind, UserError) else None


class Training:
    """A work in progress."""

    def __init__(self, session: Session, work: Work, found: Found | None) -> None:
        config, watch = session.config, session.watch
        self.session, self.work, self.config, self.watch = session, work, config, watch
        fill = work.fill
        if found and fill is not None:
            weight_files.load_constants(found[0] / "weights", work.model)
            fill = weight_files.slices(found[0] / "weights")
        elif found:
            weight_files.load_weights(found[0] / "weights", work.model)
        self.engine = Engine(work.model, config.train, session.ds_config, work.objective, fill)
        self.engine.arm(work.mask)
        for note in self.engine.notes if dist.rank() == 0 and verbosity.informs() else ():
            print(note, flush=True)
        self.begin: Position | None = found[1] if found else None
        self.reader: StateReader | None = None
        if found:
            self.reader = checkpoint.load_state(found[0], self.engine, found[1])
        self.done = self.begin.step if self.begin else 0
        """Updates that were done at the start."""
        self.val_loss = self.begin.val_loss if self.begin else None
        session.saver.newest = found[1].name if found else None
        memory = self.begin.memory if self.begin else {}
        self.guard = Guard(
            config.guard, self.engine, session.log, watch.stop, watch.channel, memory
        )
        self.guard.compare_tickets(work.mask_id)
        self.extra: Callable[[], Extra] = lambda: Extra(memory=dict(self.guard.memory))
        batch = config.train.global_batch_size
        self.tokens_per_update = round(batch * work.tokens_per_sample)
        self.loader = work.loader(batch, self.done * batch)
        self.profile = Profile(session.run, work.phase, config.train.profiled)
        self.bar = Progress(work.name, "update", work.steps, initial=self.done)
        startup.passed("engine")

    def started(self) -> None:
        """Say after the first update of this process how long it took to come there."""
        said = startup.at_first_update()
        if said is not None and dist.rank() == 0 and verbosity.informs():
            print(said, flush=True)

    def record(self, step: int, **values: float) -> None:
        self.session.log.write(self.work.phase, step, **values)

    def measure(self, step: int) -> None:
        """Measure on held-out data and record the result. Collective."""
        assert self.work.measure is not None
        measured = self.work.measure(self.engine)
        self.val_loss = measured["val_loss"]
        self.record(step, **measured)

    def save(self, step: int, *, must: bool) -> None:
        """Write the checkpoint of update ``step`` unless it exists; with ``must``, return only when
        it is on disk. Collective."""
        extra, saver = self.extra(), self.session.saver
        position = Position(
            phase=self.work.phase,
            step=step,
            consumed_samples=step * self.config.train.global_batch_size,
            ticket_id=self.work.mask_id,
            dataset_id=self.work.dataset_id,
            val_loss=self.val_loss,
            memory=extra.memory,
        )
        if step and position.name != saver.newest:
            seconds = saver.save(self.engine, position, more=extra.more, must=must)
            self.watch.stop.saved(seconds)

    def stop(self, step: int) -> None:
        """Raise Stopped, after update ``step`` is saved. Collective."""
        reason = self.watch.stop.reason()
        self.watch.stop.done()
        where = " of discovery" if self.work.phase == "discover" else f" of {self.work.steps:,}"
        raise Stopped(f"{reason}: saved after update {step:,}{where}; the same command resumes")
