"""The table of a run's page that compares the plan of its last start with what was measured."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from pmp_ds.run_dir import RunDir
from pmp_ds.study.tables import Table
from pmp_ds.train.planned import Plan, plan_of


def table(run: RunDir, records: list[dict[str, Any]]) -> Table:
    """Return what the last start planned beside what there is."""
    plan = plan_of(run)
    rows = [] if plan is None else [*_rows(plan, run, records)]
    return Table("plan", _about(plan), ("", "planned", "measured", "ratio"), rows)


def _rows(plan: Plan, run: RunDir, records: list[dict[str, Any]]) -> Iterable[list[str]]:
    trained = [record for record in records if record["phase"] == "train"]
    newest = max((record.get("start", 0) for record in records), default=0)
    last = [record for record in trained if record.get("start", 0) == newest]
    compared = [
        ("updates", plan.updates, max((r["step"] for r in trained), default=0)),
        ("tokens", plan.tokens, max(_values(trained, "tokens"))),
        ("host memory, bytes", plan.host_memory, max(_values(last, "peak_host_memory"))),
        ("a checkpoint, bytes", plan.checkpoint, _newest_checkpoint(run)),
        ("weights of the release, bytes", plan.release, _size(run.release.glob("*.safetensors"))),
    ]
    if plan.device_memory is not None:
        allocated = median(_values(last, "peak_memory_allocated"))
        compared.append(("device memory in an update, bytes", plan.device_memory, allocated))
    for name, planned, measured in compared:
        ratio = f"{measured / planned:.2f}" if measured else "-"
        yield [name, f"{planned:,}", f"{measured:,.0f}" if measured else "none yet", ratio]


def _about(plan: Plan | None) -> str:
    if plan is None:
        return "Nothing is known of its last start, which was one of an older version."
    started = plan.started
    ranks = f"{started.ranks} rank{'s' * (started.ranks != 1)}"
    text = f"Planned by the last start, on {ranks} ({started.device}); memory is that of rank 0. "
    text += f"Of host memory, {started.host_memory_before:,} bytes are Python and its libraries."
    return text + (
        "" if plan.has_activations else " Activations are left out: the model needs values to run."
    )


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
    return [float(record[name]) for record in records if name in record] or [0.0]
