"""Numbers of a run: one JSON line per record in metrics.jsonl, and TensorBoard scalars.

Only rank 0 writes. Nothing here may depend on which elements are in the ticket.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from torch.utils.tensorboard.writer import SummaryWriter

from pmp_ds.errors import UserError
from pmp_ds.fields import fit
from pmp_ds.foreign import parse_object, read_bytes
from pmp_ds.run_dir import RunDir, write_text

TIMINGS = {
    "tokens_per_second",
    "loader_share",
    "optimizer_share",
    "mfu",
    "peak_memory_allocated",
    "peak_memory_reserved",
    "save_stall_seconds",
    "save_seconds",
}
"""Values that differ between runs of the same command; all others are the same to the bit."""


_MOST_BYTES = 1 << 31  # in metrics.jsonl: ten million updates


NotFinite = Literal["nan", "inf", "-inf"]


class Record(TypedDict):
    """A line of metrics.jsonl. A value that is not finite is stored as text, by name."""

    phase: str
    step: int
    iou: NotRequired[float]
    loss: NotRequired[float | NotFinite]
    val_loss: NotRequired[float | NotFinite]


class MetricsLog:
    """Appends records; with ``enabled`` false it does nothing. Raises UserError for a full disk."""

    def __init__(self, run: RunDir, *, enabled: bool) -> None:
        self._enabled = enabled
        if enabled:
            self._path = run.metrics
            self._file = os.open(run.metrics, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._board = SummaryWriter(str(run.tensorboard))

    def write(self, phase: str, step: int, **values: float) -> None:
        """Record ``values`` of update ``step`` (from 1; 0 is before the first) of a phase:
        `discover` or `train`."""
        if not self._enabled:
            return
        record: dict[str, Any] = {"phase": phase, "step": step}
        record |= {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        with self._told():
            os.write(self._file, (json.dumps(record) + "\n").encode())
            for name, value in values.items():
                self._board.add_scalar(f"{phase}/{name}", value, step)

    def sync(self) -> None:
        """Make the records so far survive a power cut, like the checkpoint with them."""
        if self._enabled:
            with self._told():
                os.fsync(self._file)

    def close(self) -> None:
        if self._enabled:
            os.close(self._file)
            with contextlib.suppress(OSError):  # a full disk is reported by write
                self._board.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error}. Make room there") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all records, oldest first, without a last line cut off by a kill. Raises UserError
    that names any other damaged line, because the records after it would be lost."""
    records = []
    lines = read_bytes(path, _MOST_BYTES).splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = parse_object(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise UserError(f"{where} is damaged: {error}; repair or delete it") from None
        records.append(fit(Record, record, where))
    return records


def rewind_metrics(path: Path, last: Mapping[str, int]) -> None:
    """Drop the records after the checkpoint: those of a phase after step ``last[phase]``, and all
    records of other phases."""
    kept = [r for r in read_metrics(path) if r["step"] <= last.get(r["phase"], -1)]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)
