"""A run in numbers for node_exporter's textfile collector, in Prometheus' text format.

The file is replaced as a whole every few seconds, so that a scrape never reads half of it. Its
labels are the run's name and the phase.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmp_ds.config import Config, RunConfig
from pmp_ds.errors import EXIT_REQUEUE, require
from pmp_ds.log.records import Start, faults
from pmp_ds.run_dir import RunDir

SECONDS = 5.0
"""Seconds between two files; scrapes are further apart."""

_HELP = {
    "phase": ("gauge", "1 for the phase of the last record."),
    "update": ("gauge", "Last update recorded, of its phase."),
    "planned_updates": ("gauge", "Updates of the phase; of discovery, at most."),
    "loss": ("gauge", "Training loss in nats, mean over the batch."),
    "validation_loss": ("gauge", "Validation loss in nats."),
    "learning_rate": ("gauge", "Learning rate."),
    "gradient_norm": ("gauge", "Norm of the gradient before clipping."),
    "mask_iou_ratio": ("gauge", "IoU of the last two candidate masks of discovery."),
    "tokens": ("gauge", "Tokens of all updates of training so far."),
    "tokens_per_second": ("gauge", "Tokens per second, all ranks together."),
    "loader_ratio": ("gauge", "Share of the time that rank 0 waited for data."),
    "optimizer_ratio": ("gauge", "Share of the time in the optimizer's step."),
    "model_flops_ratio": ("gauge", "Floating-point operations of the model over the peak."),
    "peak_memory_allocated_bytes": ("gauge", "Device memory of rank 0, allocated at most."),
    "peak_memory_reserved_bytes": ("gauge", "Device memory of rank 0, reserved at most."),
    "peak_host_memory_bytes": ("gauge", "Host memory of rank 0, resident at most."),
    "skipped_batches_total": ("counter", "Batches that the guard dropped."),
    "last_update_timestamp_seconds": ("gauge", "When the last record was written."),
    "last_save_timestamp_seconds": ("gauge", "When the last checkpoint was complete."),
    "last_save_duration_seconds": ("gauge", "Time to write the last checkpoint."),
    "last_save_stall_seconds": ("gauge", "Time that training waited for the last checkpoint."),
    "starts_total": ("counter", "Starts of the run, this one included."),
    "faults_total": ("counter", "Starts that neither reached their end nor stopped on request."),
    "start_timestamp_seconds": ("gauge", "When the last start began."),
    "running": ("gauge", "1 until the run ends or stops; a killed run leaves 1 and goes stale."),
    "exit_code": ("gauge", "Exit code of the last start, once it has one."),
}

_OF_RECORD = {
    "loss": "loss",
    "val_loss": "validation_loss",
    "lr": "learning_rate",
    "grad_norm": "gradient_norm",
    "iou": "mask_iou_ratio",
    "tokens": "tokens",
    "tokens_per_second": "tokens_per_second",
    "loader_share": "loader_ratio",
    "optimizer_share": "optimizer_ratio",
    "mfu": "model_flops_ratio",
    "peak_memory_allocated": "peak_memory_allocated_bytes",
    "peak_memory_reserved": "peak_memory_reserved_bytes",
    "peak_host_memory": "peak_host_memory_bytes",
    "skipped": "skipped_batches_total",
    "save_seconds": "last_save_duration_seconds",
    "save_stall_seconds": "last_save_stall_seconds",
}


def check_folder(config: RunConfig) -> None:
    """Raise UserError unless rank 0, which alone calls Textfile, can write to ``prometheus``."""
    if config.prometheus is not None and os.environ.get("RANK", "0") == "0":
        folder = Path(config.prometheus)
        require(
            folder.is_dir() and os.access(folder, os.W_OK | os.X_OK),
            f"run.prometheus={folder} is not a folder that this user can write to: create it, or "
            "name the folder of node_exporter's --collector.textfile.directory",
        )


class Textfile:
    """A sink that writes one file."""

    def __init__(self, run: RunDir, config: Config, starts: Sequence[Start]) -> None:
        """Write the file at once: `metrics.prom` in the run's folder, or the run's name in the
        folder ``run.prometheus``."""
        folder = config.run.prometheus
        self._path = run.textfile if folder is None else Path(folder) / f"{config.run.name}.prom"
        self._name = config.run.name
        self._planned = {"discover": config.mask.max_steps, "train": config.train.steps}
        self._phase: str | None = None
        self._values: dict[str, float] = {"running": 1.0, "starts_total": float(len(starts) or 1)}
        self._values["faults_total"] = float(faults(starts[:-1]))
        if starts and starts[-1].began is not None:
            self._values["start_timestamp_seconds"] = starts[-1].began
        self._next, self._failed = 0.0, False
        self._write()

    def record(self, record: dict[str, Any]) -> None:
        phase, values = record["phase"], self._values
        if phase != self._phase and phase == "train":
            values.pop("mask_iou_ratio", None)
        self._phase = phase
        values |= {_OF_RECORD[name]: record[name] for name in _OF_RECORD if name in record}
        values["update"] = record["step"]
        values["last_update_timestamp_seconds"] = record["time"]
        if "save_seconds" in record:
            values["last_save_timestamp_seconds"] = record["time"]
        if time.monotonic() >= self._next:
            self._write()

    def close(self, code: int | None) -> None:
        self._values["running"] = 0.0
        if code is not None:
            self._values["exit_code"] = code
        self._values["faults_total"] += code not in (0, EXIT_REQUEUE)
        self._write()

    def _write(self) -> None:
        self._next = time.monotonic() + SECONDS
        text = text_of(self._name, self._phase, self._values, self._planned)
        aside = self._path.with_name(f".{self._path.name}.incomplete")
        try:
            # Without fsync, which would wait for checkpoints: after a power cut it is old anyway.
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
            with open(aside, "x", encoding="utf-8") as file:
                file.write(text)
            os.replace(aside, self._path)
        except OSError as error:
            if not self._failed:
                print(
                    f"warning: {self._path} cannot be written: {error}. Training continues",
                    file=sys.stderr,
                    flush=True,
                )
            self._failed = True


def text_of(
    run: str, phase: str | None, values: Mapping[str, float], planned: Mapping[str, int]
) -> str:
    """Return the file's content; ``phase`` is None before the first record."""
    label = f'run="{_escaped(run)}"'
    shown: dict[str, float] = dict(values)
    if phase is not None:
        shown["planned_updates"] = planned[phase]
    lines: list[str] = []
    for name, (kind, text) in _HELP.items():
        samples = _phases(label, phase) if name == "phase" else [(label, shown.get(name))]
        full = f"pmp_ds_{name}"
        rows = [f"{full}{{{labels}}} {_number(v)}" for labels, v in samples if v is not None]
        if rows:
            lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", *rows]
    return "\n".join(lines) + "\n"


def _phases(label: str, phase: str | None) -> Iterator[tuple[str, float]]:
    for one in ("discover", "train"):
        yield f'{label},phase="{one}"', float(one == phase)


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
