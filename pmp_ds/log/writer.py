"""Write the records of one start of a run, and feed its sinks.

Only rank 0 writes.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from pmp_ds.errors import UserError
from pmp_ds.log.board import Board
from pmp_ds.log.records import END, Start, append, line_of, now, read_both
from pmp_ds.run_dir import RunDir

Record = dict[str, Any]


class Sink(Protocol):
    """Receives the records of a start. It must not raise OSError: only metrics.jsonl is needed to
    go on."""

    def record(self, record: Record) -> None:
        """Show one record; its values may be NaN or infinite."""

    def close(self, code: int | None) -> None:
        """Show that the start ended with exit code ``code``, None for a fault."""


MakeSinks = Callable[[Sequence[Start]], Sequence[Sink]]


class MetricsLog:
    """Appends records; with ``enabled`` false it does nothing. Raises UserError for a full disk."""

    def __init__(self, run: RunDir, *, enabled: bool, sinks: MakeSinks = lambda _: ()) -> None:
        """Open the log of the start that ``begin`` recorded last; ``sinks`` of all starts so far
        makes what is fed besides TensorBoard."""
        self._enabled = enabled
        if not enabled:
            return
        records, starts = read_both(run.metrics)
        self._start = starts[-1].number if starts else 1
        self._step = starts[-1].resumed.get("train", 0) if starts else 0
        self._path = run.metrics
        self._sinks: list[Sink] = [Board(run.tensorboard, starts, records)]
        self._sinks += sinks(starts)
        self._file = os.open(run.metrics, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, phase: str, step: int, **values: float) -> None:
        """Record ``values`` of update ``step`` (from 1; 0 is before the first) of a phase:
        `discover` or `train`."""
        if not self._enabled:
            return
        self._step = step
        record = {"phase": phase, "step": step, **values, "time": now(), "start": self._start}
        self._append(record)
        for sink in self._sinks:
            sink.record(record)

    def sync(self) -> None:
        """Make the records so far survive a power cut, like the checkpoint with them."""
        if self._enabled:
            with self._told():
                os.fsync(self._file)

    def close(self, code: int | None = 0) -> None:
        """Record the exit code; None is a fault, which leaves no record, like a kill."""
        if not self._enabled:
            return
        if code is not None:
            with contextlib.suppress(UserError):  # a full disk is reported by write
                end = {"phase": END, "step": self._step, "code": code}
                self._append(end | {"time": now(), "start": self._start})
        os.close(self._file)
        for sink in self._sinks:
            sink.close(code)

    def _append(self, record: Record) -> None:
        plain = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        with self._told():
            append(self._file, line_of(plain))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error}. Make room there") from None
