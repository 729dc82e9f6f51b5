"""metrics.jsonl, one JSON line per record. Lines are only ever appended, so `tail -f` follows a run
through all its starts.

    {"phase": "start", "step": 4, "resumed": {"discover": 500, "train": 4}, "time": ..., "start": 2}
    {"phase": "train", "step": 5, "loss": 2.5, "lr": 1e-05, "time": 1764428948.123, "start": 2}
    {"phase": "end", "step": 12, "code": 0, "time": ..., "start": 2}

`time` is the wall clock in seconds since 1970 (UTC), and `start` counts the starts of the run from
1. Records after the updates where a later start resumed are superseded: ``read_metrics`` leaves
them out. A start without an end was killed, or ended by a fault.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from pmp_ds.errors import EXIT_REQUEUE, UserError
from pmp_ds.fields import fit
from pmp_ds.foreign import parse_object, read_bytes
from pmp_ds.run_dir import fsync_dir

RATES = {
    "tokens_per_second",
    "loader_share",
    "optimizer_share",
    "mfu",
    "peak_memory_allocated",
    "peak_memory_reserved",
    "peak_host_memory",
    "save_stall_seconds",
    "save_seconds",
}
"""Values about the machine."""

TIMINGS = RATES | {"time", "start"}
"""Values that differ between runs of the same command; all others are the same to the bit."""

START, END = "start", "end"

_MOST_BYTES = 1 << 31  # in metrics.jsonl: ten million updates


NotFinite = Literal["nan", "inf", "-inf"]


class Record(TypedDict):
    """A line of metrics.jsonl. A value that is not finite is stored as text, by name. Lines of
    pmp-ds 0.1.0 have neither time nor start."""

    phase: str
    step: int
    time: NotRequired[float]
    start: NotRequired[int]
    iou: NotRequired[float]
    loss: NotRequired[float | NotFinite]
    val_loss: NotRequired[float | NotFinite]


class _StartRecord(TypedDict):
    phase: str
    step: int
    time: float
    start: int
    resumed: dict[str, int]


class _EndRecord(TypedDict):
    phase: str
    step: int
    time: float
    start: int
    code: int


@dataclass(frozen=True)
class Start:
    """One start of a run, as far as it got."""

    number: int
    began: float | None
    """Seconds since 1970; None for a start of pmp-ds 0.1.0."""
    resumed: Mapping[str, int]
    """The updates after which it resumed, by phase; empty for a beginning."""
    last: tuple[str, int] | None
    """Phase and update of its last record."""
    ended: float | None
    """When it wrote its last line, in seconds since 1970."""
    code: int | None
    """Its exit code; None while it runs, and if it was killed or ended by a fault at once."""


def begin(path: Path, resumed: Mapping[str, int]) -> int:
    """Record a start that resumes after the updates ``resumed``, by phase; return its number. On
    disk on return.

    Earlier records of a phase after ``resumed[phase]``, and all of other phases, are superseded. A
    line cut off by a kill is closed, so that it damages no other. Raises OSError.
    """
    starts = read_starts(path)
    number = starts[-1].number + 1 if starts else 1
    record = {
        "phase": START,
        "step": resumed.get("train", resumed.get("discover", 0)),
        "resumed": dict(resumed),
        "time": now(),
        "start": number,
    }
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        is_cut = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        append(file, b"\n" * is_cut + line_of(record))
        os.fsync(file)
    finally:
        os.close(file)
    fsync_dir(path.parent)
    return number


def now() -> float:
    """Return the wall clock in seconds since 1970, to the millisecond."""
    return round(time.time(), 3)


def line_of(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def append(file: int, line: bytes) -> None:
    """Append to an open file all of ``line``, or nothing of it. Raises OSError."""
    size = os.fstat(file).st_size
    try:
        while line:
            line = line[os.write(file, line) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, size)
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all records that no later start superseded, oldest first, without lines cut off by a
    kill. Raises UserError that names any other damaged line, because the records after it would be
    lost."""
    return valid(_lines(path))


def valid(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records among the whole lines of a file, or of its end, that no later start
    superseded, in their order."""
    kept = []
    limits: Mapping[str, int] | None = None  # by phase, of all later starts
    for record in reversed(lines):
        phase = record["phase"]
        if phase == START:
            resumed = record["resumed"]
            earlier = resumed if limits is None else limits
            limits = {p: min(earlier[p], resumed[p]) for p in earlier if p in resumed}
        elif phase != END and (limits is None or record["step"] <= limits.get(phase, -1)):
            kept.append(record)
    return kept[::-1]


def read_starts(path: Path) -> list[Start]:
    """Return all starts of a run, oldest first. Raises UserError like ``read_metrics``."""
    return _starts(_lines(path))


def read_both(path: Path) -> tuple[list[dict[str, Any]], list[Start]]:
    """Return ``read_metrics`` and ``read_starts`` of one reading."""
    lines = _lines(path)
    return valid(lines), _starts(lines)


def _starts(lines: Iterable[dict[str, Any]]) -> list[Start]:
    parts: list[list[dict[str, Any]]] = []
    for record in lines:
        if record["phase"] == START or not parts:
            parts.append([])
        parts[-1].append(record)
    return [_start(part) for part in parts]


def _start(records: list[dict[str, Any]]) -> Start:
    first = records[0]
    told = first if first["phase"] == START else {}
    at = [(r["phase"], r["step"]) for r in records if r["phase"] not in (START, END)]
    return Start(
        number=told.get("start", 1),
        began=told.get("time"),
        resumed=told.get("resumed", {}),
        last=at[-1] if at else None,
        ended=records[-1].get("time"),
        code=records[-1].get("code") if records[-1]["phase"] == END else None,
    )


def faults(starts: Iterable[Start]) -> int:
    """Return how many of these finished starts neither reached their end nor stopped on request."""
    known = (start for start in starts if start.began is not None)
    return sum(start.code not in (0, EXIT_REQUEUE) for start in known)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return every whole line. One that is not is dropped where a kill explains it: at the end, and
    right before the record of the next start, which closed it."""
    found = []
    lines = read_bytes(path, _MOST_BYTES).splitlines(keepends=True) if path.exists() else []
    cut: UserError | None = None
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = parse_object(line)
        except ValueError as error:
            cut = cut or UserError(f"{where} is damaged: {error}; repair or delete it")
            continue
        phase = record.get("phase")
        if cut is not None and phase != START:
            raise cut
        cut = None
        kind = _StartRecord if phase == START else _EndRecord if phase == END else Record
        found.append(fit(kind, record, where))
    if cut is not None and lines[-1].endswith(b"\n"):
        raise cut
    return found
