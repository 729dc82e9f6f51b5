"""The table of a run's page that compares the plan of its last start with what was measured."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from pmp_ds.foreign import ForeignError, read_object
from pmp_ds.run_dir import RunDir
from pmp_ds.study.tables import Table


def table(run: RunDir, records: list[dict[str, Any]]) -> Table:
    """Return what the last start planned beside what there is; older runs have no plan."""
    try:
        plan = read_object(run.plan)
    except ForeignError:
        plan = {}
    trained = [record for record in records if record["phase"] == "train"]
    found = {
        "updates": ("updates", max((r["step"] for r in trained), default=0)),
        "tokens": ("tokens", _most(trained, "tokens")),
        "device_memory": (
            "device memory of rank 0 in an update, bytes",
            _middle(trained, "peak_memory_allocated"),
        ),
        "host_memory": ("host memory of rank 0, bytes", _most(trained, "peak_host_memory")),
        "checkpoint": ("a checkpoint, bytes", _newest_checkpoint(run)),
        "release": ("the release's weights, bytes", _size(run.release.glob("*.safetensors"))),
    }
    rows = []
    for name, (words, measured) in found.items():
        if isinstance(planned := plan.get(name), int):
            ratio = f"{measured / planned:.2f}" if measured and planned else "-"
            there = f"{measured:,.0f}" if measured else "none yet"
            rows.append((words, f"{planned:,}", there, ratio))
    return Table("plan", _about(plan), ("", "planned", "measured", "ratio"), rows)


def _about(plan: Mapping[str, Any]) -> str:
    if not plan:
        return "This run stores no plan: it was started last by an older version."
    before = plan.get("host_memory_before")
    text = f"Planned by the last start, for {plan.get('ranks')} ranks. "
    if isinstance(before, int):
        text += f"Of the host memory {before:,} bytes are Python and its libraries at that start. "
    if plan.get("activations_counted") is False:
        text += "Activations are not in the plan: this model does not run without values."
    return text.strip()


def _newest_checkpoint(run: RunDir) -> int:
    folders = sorted(run.checkpoints.glob("update-????????"))
    return _size(folders[-1].rglob("*")) if folders else 0


def _size(paths: Iterable[Path]) -> int:
    """Return the bytes of these files; those that vanish meanwhile do not count."""
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _values(records: list[dict[str, Any]], name: str) -> list[float]:
    return [float(record[name]) for record in records if name in record]


def _most(records: list[dict[str, Any]], name: str) -> float:
    return max(_values(records, name), default=0.0)


def _middle(records: list[dict[str, Any]], name: str) -> float:
    values = _values(records, name)
    return median(values) if values else 0.0
