"""Numbers of a run: one JSON line per record in metrics.jsonl, and TensorBoard scalars.

Only rank 0 writes. Nothing here may depend on which elements are in the ticket.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from pmp_ds.errors import UserError
from pmp_ds.run_dir import RunDir, write_text

TIMINGS = {
    "tokens_per_second", "loader_share", "save_stall_seconds", "save_seconds",
}  # fmt: skip
"""Values that differ between two runs of the same command; all others are the same to the bit."""


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
        """Make the records so far survive a power cut, as the checkpoint beside them does."""
        if self._enabled:
            with self._told():
                os.fsync(self._file)

    def close(self) -> None:
        if self._enabled:
            os.close(self._file)
            with contextlib.suppress(OSError):  # of a full disk: told by write
                self._board.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error}. Make room there") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records, oldest first; a last line cut off by a kill is dropped."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def rewind_metrics(path: Path, last: Mapping[str, int]) -> None:
    """Drop the records after the checkpoint: those of a phase with a step beyond ``last[phase]``;
    a phase that is not named is dropped whole."""
    kept = [r for r in read_metrics(path) if r["step"] <= last.get(r["phase"], -1)]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
