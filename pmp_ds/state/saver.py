"""Write checkpoints during training, one at a time.

Training waits only for the copy to CPU memory. A thread writes, hashes and renames, and talks to
those of the other ranks over a separate process group.
"""

import sys
import threading
import time
from typing import Any

from pmp_ds import dist
from pmp_ds.config import Config
from pmp_ds.engine.engine import Engine
from pmp_ds.log.writer import MetricsLog
from pmp_ds.run_dir import RunDir
from pmp_ds.state import checkpoint, shelf
from pmp_ds.state.checkpoint import NotWrittenError, Snapshot, Tensors
from pmp_ds.state.manifest import Position


class Saver:
    """Writes the checkpoints of one run; collective like the engine."""

    def __init__(self, run: RunDir, config: Config, log: MetricsLog) -> None:
        self._run, self._config, self._log = run, config, log
        self._channel = dist.SideChannel() if config.run.async_save else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._under_way: tuple[Position, float] | None = None
        self._write_seconds = 0.0
        self.newest: str | None = None
        """Name of the last requested checkpoint."""

    def save(
        self,
        engine: Engine,
        position: Position,
        *,
        more: Tensors | None = None,
        must: bool = False,
    ) -> float:
        """Take a checkpoint and start writing it. Returns the seconds that training waited.

        With ``must`` it is on disk on return, or NotWrittenError is raised. Otherwise a failure
        becomes a warning or an error, depending on guard.disk, at the next ``wait``.
        """
        start = time.perf_counter()
        self.wait()
        background = self._channel is not None
        snapshot = checkpoint.take(engine, position, copy=background, more=more or {})
        self.newest = position.name
        if background:
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="saver")
            self._thread.start()
            if must:
                self._thread.join()
        else:
            self._write(snapshot)
        stall = time.perf_counter() - start
        self._under_way = position, stall
        if must or not background:
            self.wait(must=must)
        return stall

    def wait(self, *, must: bool = False) -> None:
        """Wait until nothing is being written; report or raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        done, self._under_way = self._under_way, None
        if error is None and done is not None:
            position, stall = done
            self._log.sync()
            self._log.write(
                position.phase,
                position.step,
                save_stall_seconds=stall,
                save_seconds=self._write_seconds,
            )
        if isinstance(error, NotWrittenError) and not must and self._config.guard.disk == "warn":
            if dist.rank() == 0:
                print(f"warning: {error}. Training continues", file=sys.stderr, flush=True)
        elif error is not None:
            raise error

    def close(self) -> None:
        """Finish writing; an error is reported, not raised."""
        try:
            self.wait()
        except Exception as error:  # noqa: BLE001 - the run ends, or has failed already
            if dist.is_lost_rank(error):
                return  # reported elsewhere
            print(f"warning: the last checkpoint: {error}", file=sys.stderr, flush=True)
        if self._channel is not None:
            self._channel.close()

    def _write(self, snapshot: Snapshot) -> None:
        start = time.perf_counter()
        gather: Any = self._channel.all_gather if self._channel else dist.all_gather_object
        try:
            checkpoint.write(self._run, snapshot, gather)
            if dist.rank() == 0:
                run, done = self._config.run, snapshot.position
                shelf.prune(self._run, done.phase, run.keep_last, run.keep_every, done.name)
        except BaseException as error:  # noqa: BLE001 - raised by wait()
            self._error = error
        self._write_seconds = time.perf_counter() - start
