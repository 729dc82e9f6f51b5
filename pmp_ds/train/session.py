"""A run's folder while it is trained in, by pretraining or fine-tuning alike.

    with Session(run, config, ds_config, watch) as session:
        with session.training(work, found) as training:
            train(training)  # loop.py

A *work* is a phase of a run as its caller describes it; a *training* is that phase under way: an
engine at the update where the run stands, its batches, its guard, and what a checkpoint saves.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pmp_ds import dist
from pmp_ds.config import Config
from pmp_ds.data.loader import BlockLoader
from pmp_ds.engine.engine import Engine
from pmp_ds.engine.objective import Objective
from pmp_ds.errors import Stopped
from pmp_ds.log import MetricsLog
from pmp_ds.progress import Progress
from pmp_ds.run_dir import RunDir
from pmp_ds.state import checkpoint, weight_files
from pmp_ds.state.manifest import Phase, Position
from pmp_ds.state.saver import Saver
from pmp_ds.state.shelf import Found
from pmp_ds.state.state_reader import StateReader
from pmp_ds.ticket.mask import ParamMask
from pmp_ds.watch.guard import Guard
from pmp_ds.watch.watch import Watch

Measure = Callable[[Engine], dict[str, float]]
"""What is measured on held-out data, by name; `val_loss` among it. Collective."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained on what, the same on every rank."""

    phase: Phase = "train"
    name: str
    """Of the progress bar."""
    model: Any
    """The model at its first weights, fp32 on CPU: a PreTrainedModel, or peft's around one."""
    mask: ParamMask | None = None
    """The elements that train; None: all that can."""
    mask_id: str | None = None
    objective: Objective
    samples: Any
    """What BlockLoader reads."""
    order: bytes
    """The key of the samples' order, 32 bytes."""
    dataset_id: str
    tokens_per_sample: float
    steps: int
    """Updates to the end of the phase."""
    measure: Measure | None = None

    def loader(self, global_batch_size: int, consumed_samples: int) -> BlockLoader:
        """This rank's share of the samples after the first ``consumed_samples``."""
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
    """What a phase saves in addition to weights and optimizer state: its memory, and in discovery
    this rank's running scores and the candidate masks."""

    more: checkpoint.Tensors = field(default_factory=dict)
    masks: checkpoint.Tensors = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


class Session:
    """The records and checkpoints of one run folder; a context, in which one work after another is
    trained."""

    def __init__(
        self, run: RunDir, config: Config, ds_config: dict[str, Any], watch: Watch
    ) -> None:
        self.config, self.ds_config, self.watch = config, ds_config, watch
        self.log = MetricsLog(run, enabled=dist.rank() == 0)
        self.saver = Saver(run, config, self.log)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.saver.close()
        self.log.close()

    @contextlib.contextmanager
    def training(self, work: Work, found: Found | None) -> Iterator["Training"]:
        """Begin ``work``, or resume it from the checkpoint ``found``. Collective."""
        training = Training(self, work, found)
        with training.loader, training.bar:
            yield training
        self.saver.wait()
        training.engine.close()


class Training:
    """A work under way."""

    def __init__(self, session: Session, work: Work, found: Found | None) -> None:
        config, watch = session.config, session.watch
        self.session, self.work, self.config, self.watch = session, work, config, watch
        if found:
            weight_files.load_weights(found[0] / "weights", work.model)
        self.engine = Engine(work.model, config.train, session.ds_config, work.objective)
        self.engine.arm(work.mask)
        self.begin: Position | None = found[1] if found else None
        self.reader: StateReader | None = None
        if found:
            self.reader = checkpoint.load_state(found[0], self.engine, found[1])
        self.done = self.begin.step if self.begin else 0
        """Updates at the start."""
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
        self.bar = Progress(work.name, "update", work.steps, initial=self.done)

    def record(self, step: int, **values: float) -> None:
        self.session.log.write(self.work.phase, step, **values)

    def measure(self, step: int) -> None:
        """Measure on held-out data, and record it. Collective."""
        assert self.work.measure is not None
        measured = self.work.measure(self.engine)
        self.val_loss = measured["val_loss"]
        self.record(step, **measured)

    def save(self, step: int, *, must: bool) -> None:
        """Write the checkpoint of update ``step``, unless it is there; with ``must`` it is on disk
        on return. Collective."""
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
            seconds = saver.save(
                self.engine, position, more=extra.more, masks=extra.masks, must=must
            )
            self.watch.stop.saved(seconds)

    def stop(self, step: int) -> None:
        """Raise Stopped, when all of update ``step`` is saved. Collective."""
        reason = self.watch.stop.reason()
        self.watch.stop.done()
        where = " of discovery" if self.work.phase == "discover" else f" of {self.work.steps:,}"
        raise Stopped(f"{reason}: saved after update {step:,}{where}; the same command goes on")
