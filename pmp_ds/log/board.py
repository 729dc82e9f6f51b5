"""TensorBoard: the records of metrics.jsonl in the groups train/, discovery/, eval/ and system/."""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from pmp_ds.log.records import RATES, Start

_FLUSH_SECONDS = 30
_NO_VALUES = ("phase", "step", "time", "start")
_TRAINING = ("loss", "lr", "grad_norm", "tokens", "skipped", "iou")


def tag(phase: str, name: str) -> str:
    """Return `eval/val_loss` for the value `val_loss`; what is not of training was measured on
    held-out data. Updates of discovery are counted apart, so its rates have a group of theirs."""
    discovers = phase == "discover"
    if name in RATES:
        return f"system/discovery/{name}" if discovers else f"system/{name}"
    if name in _TRAINING:
        return f"discovery/{name}" if discovers else f"train/{name}"
    return f"eval/{name}"


def values_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record, also of one that was read, in which NaN is text."""
    return {name: float(value) for name, value in record.items() if name not in _NO_VALUES}


class Board:
    """A sink for TensorBoard's event files in ``folder``."""

    def __init__(
        self, folder: Path, starts: Sequence[Start], records: Iterable[dict[str, Any]]
    ) -> None:
        """Hide the points that this start superseded. TensorBoard hides all points from one update
        on, whatever their phase: the valid ones among ``records`` are written again."""
        purge = None
        if len(starts) > 1:
            resumed, records = starts[-1].resumed, list(records)
            # Of a phase without valid records all points are hidden, if it has any.
            phases = {record["phase"] for record in records}
            phases |= {start.last[0] for start in starts if start.last}
            purge = 1 + min((resumed.get(phase, -1) for phase in phases), default=-1)
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=_FLUSH_SECONDS)
        if purge is not None:
            for record in records:
                if record["step"] >= purge:
                    self.record(record)

    def record(self, record: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a full disk is reported by metrics.jsonl
            for name, value in values_of(record).items():
                where, seconds = tag(record["phase"], name), record.get("time")
                self._writer.add_scalar(where, value, record["step"], walltime=seconds)

    def close(self, code: int | None) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()
