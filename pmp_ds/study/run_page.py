"""One run as one HTML file that needs nothing beside it: `runs/NAME/report.html`.

It shows what `pmp-ds report --run` prints, the curves, throughput, and the starts and faults of the
run. Like that text, nothing in it depends on which elements are in the ticket.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from pmp_ds.errors import EXIT_REQUEUE, UserError
from pmp_ds.log import Start
from pmp_ds.log.records import faults, read_both
from pmp_ds.plots import plot_into, plot_throughput
from pmp_ds.run_dir import RunDir, write_text
from pmp_ds.study import run_plan
from pmp_ds.study.figures import Picture
from pmp_ds.study.page import Section, page
from pmp_ds.study.tables import Table

_CAPTIONS = {
    "loss": ("Losses by update", "Training and validation loss, in nats per token."),
    "iou": ("IoU by update of discovery", "IoU of consecutive candidate masks in discovery."),
    "throughput": ("Tokens per second by update", "Tokens per second of all ranks; marks: starts."),
}

_MEASURED = {
    "tokens_per_second": ("tokens per second", "{:,.0f}"),
    "mfu": ("share of the device's peak FLOP/s", "{:.1%}"),
    "loader_share": ("share of the time waiting for data", "{:.1%}"),
    "optimizer_share": ("share of the time in the optimizer", "{:.1%}"),
    "peak_memory_allocated": ("peak device memory of rank 0, allocated, bytes", "{:,.0f}"),
    "peak_memory_reserved": ("peak device memory of rank 0, reserved, bytes", "{:,.0f}"),
    "peak_host_memory": ("peak host memory of rank 0, bytes", "{:,.0f}"),
    "save_seconds": ("seconds to write a checkpoint", "{:.2f}"),
    "save_stall_seconds": ("seconds that training waited for one", "{:.2f}"),
}


def write(run: RunDir, name: str, rows: Mapping[str, str]) -> Path:
    """Write the page with the printed ``rows`` and return its path. Raises UserError for damaged
    metrics, and for a folder that cannot be written."""
    records, starts = read_both(run.metrics)
    with tempfile.TemporaryDirectory() as folder:
        paths = plot_into(run, records, Path(folder))
        paths += plot_throughput(records, Path(folder))
        pictures = [Picture(path.stem, *_CAPTIONS[path.stem]) for path in sorted(paths)]
        sections = [
            Section("Summary", [_table("summary", "", ("", ""), rows.items())]),
            Section("Curves", pictures),
            Section("Plan and measurements", [run_plan.table(run, records), _measured(records)]),
            Section("Starts and faults", [_in_words(starts), _starts(starts)]),
        ]
        text = page(f"Run {name}", sections, Path(folder))
    try:
        write_text(run.report, text)
    except OSError as error:
        raise UserError(f"{run.report} cannot be written: {error}") from None
    return run.report


def _table(name: str, caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    return Table(name, caption, head, [list(row) for row in rows])


def _measured(records: list[dict[str, Any]]) -> Table:
    """Return median and extremes of what was measured in training."""
    rows = []
    for name, (words, form) in _MEASURED.items():
        values = [float(r[name]) for r in records if r["phase"] == "train" and name in r]
        if values:
            cells = (median(values), min(values), max(values))
            rows.append((words, *map(form.format, cells)))
    caption = "Over the records of training that count."
    return _table("measured", caption, ("", "median", "least", "most"), rows)


def _in_words(starts: Sequence[Start]) -> str:
    ended = [start for start in starts if start is not starts[-1] or start.code is not None]
    count = faults(ended)  # the last may still be running
    return f"{len(starts)} start{'s' * (len(starts) != 1)}, of which {count} ended by a fault."


def _starts(starts: Sequence[Start]) -> Table:
    rows = [
        (
            str(start.number),
            _clock(start.began),
            _places(start.resumed),
            "nothing" if start.last is None else _places(dict([start.last])),
            _clock(start.ended),
            _how(start, is_last=start is starts[-1]),
        )
        for start in starts
    ]
    head = ("start", "began (UTC)", "resumed after", "got to", "last line (UTC)", "end")
    return _table("starts", "Work after the next start's `resumed after` was repeated.", head, rows)


def _places(steps: Mapping[str, int]) -> str:
    """Return `update 12`; an update of discovery matters only before there is one of training."""
    if "train" in steps:
        return f"update {steps['train']:,}"
    if "discover" in steps:
        return f"update {steps['discover']:,} of discovery"
    return "the beginning"


def _how(start: Start, *, is_last: bool) -> str:
    if start.code is None:
        return "none recorded: " + ("running, or killed" if is_last else "killed, or a fault")
    words = {0: "done", EXIT_REQUEUE: "stopped on request"}
    return words.get(start.code, f"code {start.code}")


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
