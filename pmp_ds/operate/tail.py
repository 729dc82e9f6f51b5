"""The newest records of a run, from the last part of metrics.jsonl. Imports no torch, reads little.

tail = read_tail(run.metrics)        tail.value("train", "loss")  ->  (update, value)
"""

import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmp_ds.foreign import parse_object
from pmp_ds.log.records import START, valid

MOST_BYTES = 1 << 20  # thousands of updates
_NUMBERS = ("loss", "val_loss", "tokens", "tokens_per_second", "save_seconds")
_RATES = 50
"""Records whose rates decide about the time left."""


@dataclass(frozen=True)
class Tail:
    """Records, oldest first, and what is wrong with the file."""

    records: tuple[dict[str, Any], ...] = ()
    written: float | None = None
    """When the file was last written, as `time.time`."""

    problem: str | None = None

    def value(self, phase: str, name: str) -> tuple[int, float] | None:
        """Return update and value of the newest record of a phase that has ``name``."""
        for record in reversed(self.records):
            if record["phase"] == phase and name in record:
                return record["step"], float(record[name])
        return None

    def step(self, phase: str) -> int:
        """Return the last update of a phase that was recorded, or 0."""
        return max((r["step"] for r in self.records if r["phase"] == phase), default=0)

    def update_seconds(self) -> float | None:
        """Return the median seconds of a training update, without measurements and saves."""
        found = [
            record["tokens"] / record["step"] / record["tokens_per_second"]
            for record in self.records
            if record["step"] and record.get("tokens") and record.get("tokens_per_second")
        ]
        return statistics.median(found[-_RATES:]) if found else None


def read_tail(path: Path) -> Tail:
    """Return the newest records that count; lines that are cut off or damaged are left out."""
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            file.seek(max(0, facts.st_size - MOST_BYTES))
            content = file.read(MOST_BYTES)
    except FileNotFoundError:
        return Tail()
    except OSError as error:
        return Tail(problem=f"{path} cannot be read: {error.strerror}")
    lines = content.split(b"\n")
    lines.pop()  # empty, or being written
    if facts.st_size > MOST_BYTES:
        del lines[0]
    records, damaged, was_damaged = [], 0, False
    for line in lines:
        try:
            record = _checked(parse_object(line))
        except ValueError:
            damaged, was_damaged = damaged + 1, True
            continue
        if (
            was_damaged and record["phase"] == START
        ):  # a kill cut that line, and this start closed it
            damaged -= 1
        was_damaged = False
        records.append(record)
    problem = f"{path} has damaged lines near its end: {damaged}" if damaged else None
    return Tail(tuple(valid(records)), facts.st_mtime, problem)


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its numbers as numbers. Raises ValueError for another line."""
    if not isinstance(record.get("phase"), str) or type(record.get("step")) is not int:
        raise ValueError("not a record")
    resumed = record.get("resumed", {} if record["phase"] != START else None)
    if not isinstance(resumed, dict) or not all(type(step) is int for step in resumed.values()):
        raise ValueError("resumed")
    for name in _NUMBERS:
        if name in record:
            if type(record[name]) not in (int, float, str):
                raise ValueError(name)
            record[name] = float(record[name])  # one that is not finite is stored as text
    rate = record.get("tokens_per_second")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        del record["tokens_per_second"]
    return record
