"""The main job inside a kept rank (helpers/distributed.py), with a fault injected from outside:
real files, real engines, real collectives, without the seconds of a new process.

    lives = ranks2.run(live, str(work), ["--run.root", str(tmp_path)], nan_loss, (3,))
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pmp_ds import dist
from pmp_ds.cli import parse
from pmp_ds.commands.pretrain import Options
from pmp_ds.config import Config
from pmp_ds.data.loader import BlockLoader
from pmp_ds.data.mixed_store import open_data
from pmp_ds.engine.deepspeed_config import merge, read_json
from pmp_ds.engine.engine import Engine
from pmp_ds.errors import as_rank, exit_code
from pmp_ds.log import TIMINGS, read_metrics
from pmp_ds.run_dir import RunDir
from pmp_ds.state import checkpoint
from pmp_ds.train import job, pipeline
from pmp_ds.train.session import Work
from tests.helpers import capabilities, tiny
from tests.helpers.waits import counted

SETTINGS = (
    "--mask.source",
    "random",
    "--train.steps",
    "12",
    "--train.warmup_steps",
    "2",
    "--train.micro_batch_size",
    "4",
    "--run.val_every",
    "12",
    "--run.checkpoint_every",
    "4",
    "--run.val_blocks",
    "8",
)
"""Settings of a short run: checkpoints after updates 4, 8 and 12."""


@dataclass(frozen=True)
class Life:
    """Describe how a run ended on one rank."""

    code: int
    out: str
    err: str


def live(
    work: str,
    arguments: Sequence[str],
    fault: Callable[..., AbstractContextManager[None]] | None = None,
    given: Sequence[Any] = (),
    stage: int = 1,
) -> Life:
    """Run launcher/pretrain.py, after its process group is made, in ``work`` (helpers/workdir.py),
    with the context ``fault(*given)`` around it."""
    folder = Path(work)
    recipe = ("--config", str(folder / "tiny.yaml"), "--data.store", str(folder / "store"))

    def main() -> None:
        given = [*recipe, *SETTINGS, *arguments]
        config, options = parse(Config, given, options=Options)
        ds_config = read_json(folder / f"zero{stage}.json")
        merge(ds_config, config.train, dist.world_size())
        store, run = open_data(config.data.store), RunDir(Path(config.run.root) / config.run.name)
        job.check(config, store, run)
        pipeline.run(
            config, ds_config, store, run, time.monotonic(), start_afresh=options.start_afresh
        )

    out, err = io.StringIO(), io.StringIO()
    as_rank()
    dump = signal.getsignal(signal.SIGUSR1)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        fault(*given) if fault else contextlib.nullcontext(),
    ):
        code = exit_code(main)
    assert signal.getsignal(signal.SIGUSR1) == dump
    return Life(code, out.getvalue(), err.getvalue())


# Faults. Each is a context; `update` counts from 1, `rank` is the affected rank.


@contextlib.contextmanager
def _around_losses(
    change: Callable[[Engine, int, torch.Tensor], torch.Tensor],
) -> Iterator[None]:
    """Apply ``change(engine, update, losses)`` to the losses of every training micro-batch."""
    original = Engine.losses

    def changed(self: Engine, input_ids: torch.Tensor) -> torch.Tensor:
        losses = original(self, input_ids)
        if not torch.is_grad_enabled():
            return losses
        return change(self, self._engine.global_steps + 1, losses)

    with mock.patch.object(Engine, "losses", changed):
        yield


def scaled_loss(update: int, factor: float, rank: int = 1) -> AbstractContextManager[None]:
    """Multiply the loss of a rank's share by ``factor``, which may be NaN or infinite."""

    def change(engine: Engine, now: int, losses: torch.Tensor) -> torch.Tensor:
        return losses * factor if (now, dist.rank()) == (update, rank) else losses

    return _around_losses(change)


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: torch.Tensor) -> torch.Tensor:
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf


def infinite_gradient(update: int, rank: int = 1) -> AbstractContextManager[None]:
    """Give a finite loss with a gradient that is not finite."""

    def change(engine: Engine, now: int, losses: torch.Tensor) -> torch.Tensor:
        if (now, dist.rank()) != (update, rank):
            return losses
        return _InfiniteGradient.apply(losses)

    return _around_losses(change)


def act(
    update: int, rank: int, action: Callable[..., None], *given: Any
) -> AbstractContextManager[None]:
    """Call ``action(engine, *given)`` within an update of one rank."""

    def change(engine: Engine, now: int, losses: torch.Tensor) -> torch.Tensor:
        if (now, dist.rank()) == (update, rank):
            action(engine, *given)
        return losses

    return _around_losses(change)


def slow(seconds: float, rank: int) -> AbstractContextManager[None]:
    """Slow one rank down by ``seconds`` in every forward pass."""

    def change(engine: Engine, now: int, losses: torch.Tensor) -> torch.Tensor:
        if dist.rank() == rank:
            time.sleep(seconds)
        return losses

    return _around_losses(change)


@contextlib.contextmanager
def little_room(rank: int, updates: range, num_bytes: int = 4096) -> Iterator[None]:
    """Limit the files of a rank to ``num_bytes`` during these updates: writes stop halfway, as on a
    full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(engine: Engine, now: int, losses: torch.Tensor) -> torch.Tensor:
        if dist.rank() == rank:
            _let_save_end(now == updates.start)
            soft = num_bytes if now in updates else old[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, old[1]))
        return losses

    try:
        with _around_losses(limit):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def _let_save_end(when: bool) -> None:
    """Wait for a save in progress, so that the fault does not hit an earlier checkpoint."""
    for thread in threading.enumerate() if when else ():
        if thread.name == "saver":
            thread.join()


@contextlib.contextmanager
def slow_disk(seconds: float) -> Iterator[None]:
    """Slow down the writing of every checkpoint, so that training gets far meanwhile."""
    original = checkpoint._create

    def create(folder: Path, num_bytes: int) -> None:
        time.sleep(seconds)
        original(folder, num_bytes)

    with mock.patch.object(checkpoint, "_create", create):
        yield


@contextlib.contextmanager
def read_only(folder: str, updates: range) -> Iterator[None]:
    """Make a folder read-only (mode 0500) during these updates; root gives up its right to write
    there."""

    def close(engine: Engine, now: int, losses: torch.Tensor) -> torch.Tensor:
        if dist.rank() == 0 and now in (updates.start, updates.stop):
            _let_save_end(now == updates.start)
            os.chmod(folder, 0o500 if now in updates else 0o700)
        return losses

    with capabilities.without_dac_override(), _around_losses(close):
        yield


@contextlib.contextmanager
def recorded_samples(folder: str) -> Iterator[None]:
    """Record every training batch as JSON lines of (stream, samples before, digests)."""
    original = BlockLoader.next
    path = Path(folder) / f"{uuid.uuid4()}.jsonl"

    def next_batch(self: BlockLoader) -> torch.Tensor:
        before = self.consumed_samples
        batch = original(self)
        digests = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in batch]
        with open(path, "a") as file:
            file.write(json.dumps([self._key.hex(), before, dist.rank(), digests]) + "\n")
        return batch

    with mock.patch.object(BlockLoader, "next", next_batch):
        yield


@contextlib.contextmanager
def repeated_batches(micro_batch_size: int) -> Iterator[None]:
    """Use the same micro-batch throughout an update, which makes gradients equal to the bit for 1,
    2 or 4 ranks."""

    class Loader(tiny.RepeatedLoader):
        wait_seconds = 0.0

        def __enter__(self) -> "Loader":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def loader(self: Work, global_batch_size: int, consumed_samples: int) -> Loader:
        made = Loader(micro_batch_size, global_batch_size // dist.world_size() // micro_batch_size)
        made._step = consumed_samples // global_batch_size
        return made

    with mock.patch.object(Work, "loader", loader):
        yield


@contextlib.contextmanager
def all_of(*faults: tuple[Callable[..., AbstractContextManager[None]], Sequence[Any]]) -> Any:
    """Combine several faults."""
    with contextlib.ExitStack() as stack:
        for fault, given in faults:
            stack.enter_context(fault(*given))
        yield


def raise_signal(engine: Engine, number: int) -> None:
    os.kill(os.getpid(), number)


# Files on disk after a run.


def checkpoints(run: RunDir, kind: str = "update") -> list[int]:
    """Return the updates that have a checkpoint."""
    found = run.checkpoints.glob(f"{kind}-????????")  # without those being written
    return sorted(int(path.name.split("-")[1]) for path in found)


def same_end(calm: RunDir, other: RunDir) -> None:
    """Check that ticket and last checkpoint are equal byte for byte, metrics equal except for
    timings, and no temporary files left."""
    last = f"private/checkpoints/update-{checkpoints(calm)[-1]:08d}"
    for folder in ("private/ticket", last):
        names = sorted(p.relative_to(calm.root) for p in (calm.root / folder).rglob("*.*"))
        assert names
        for name in names:
            assert _content(calm.root / name) == _content(other.root / name), name
    assert comparable(calm.metrics) == comparable(other.metrics)
    assert list(other.root.rglob("*incomplete*")) == []


def _content(path: Path) -> Any:
    """Return the bytes of a file, or a manifest without the state of the code that wrote it."""
    if path.name != "manifest.json":
        return path.read_bytes()
    return {k: v for k, v in json.loads(path.read_bytes()).items() if k not in ("code", "sha256")}


def comparable(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run without fields that differ between runs of the same command."""
    records = [{k: v for k, v in r.items() if k not in TIMINGS} for r in read_metrics(path)]
    return [record for record in records if set(record) > {"phase", "step"}]


@contextlib.contextmanager
def waits_written(path: str) -> Iterator[None]:
    """Write the waits of each update of masked pretraining (helpers/waits.py), as JSON by rank."""
    found: dict[str, Any] = {}
    with counted(found):
        yield
    Path(f"{path}.{dist.rank()}").write_text(json.dumps(found))
