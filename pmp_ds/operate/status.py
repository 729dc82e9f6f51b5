"""The state of runs, from their files alone: for people, monitoring and probes.

    for state in states([Path("runs/a")]): print(state.phase, state.step, state.alive)

Reads only, imports no torch, and works for runs of other hosts, of other users (whose private
folder is closed), and for ones that are being created or are damaged.
"""

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pmp_ds import lease_file
from pmp_ds.errors import UserError, require
from pmp_ds.operate.signs import FRESH_SECONDS, Signs, watched
from pmp_ds.operate.tail import Tail, read_tail
from pmp_ds.run_dir import RunDir
from pmp_ds.state import shelf
from pmp_ds.state.manifest import MANIFEST_FILE
from pmp_ds.state.manifest import Phase as Kind
from pmp_ds.strict_yaml import read_settings

Phase = Literal["starting", "discovery", "pretraining", "finished", "unknown"]
"""Unknown: the folder is closed to this user, or its file system does not answer."""

_TICKET_FILE = "ticket.json"  # ticket/ticket.py imports torch
_GROUPS = ("runs", "cells")  # the folders with the runs of a study, and of a sweep

_KINDS: tuple[Kind, ...] = ("train", "discover")
Saved = tuple[int | None, float | None]
"""Update of a checkpoint, and when it was written, as `time.time`."""

Value = tuple[int, float]
"""An update, and a number of it."""


@dataclass(frozen=True, kw_only=True)
class State:
    """One run; None stands for what is unknown. Ages are in seconds before now."""

    run: Path
    phase: Phase
    step: int = 0
    """Updates of this phase that were recorded."""

    steps: int | None = None
    """Updates of this phase; the most there can be, in discovery."""

    signs: Signs
    sign_age: float | None = None
    """Age of the last sign of life: of the process, or in metrics or checkpoints. None: there is
    none, or a clock is wrong."""

    record_age: float | None = None
    saved: int | None = None
    """Update of this phase's newest intact checkpoint."""

    saved_age: float | None = None
    loss: Value | None = None
    val_loss: Value | None = None
    update_seconds: float | None = None
    problems: tuple[str, ...] = ()

    @property
    def seconds_left(self) -> float | None:
        """Seconds of training that are left, without measurements and saves."""
        if self.phase == "finished":
            return 0.0
        if self.phase != "pretraining" or self.steps is None or self.update_seconds is None:
            return None
        return max(0, self.steps - self.step) * self.update_seconds

    def is_silent(self, seconds: float) -> bool:
        """Return whether an unfinished run has shown no sign of life for ``seconds``."""
        if self.phase == "finished" or (self.signs.alive and not self.signs.silent):
            return False
        return self.sign_age is None or self.sign_age > seconds

    def as_json(self) -> dict[str, Any]:
        """Return flat values; docs/OPERATIONS.md names them."""
        holder = self.signs.holder
        return {
            "run": str(self.run),
            "phase": self.phase,
            "step": self.step,
            "steps": self.steps,
            "alive": self.signs.alive,
            "sign_age": _rounded(self.sign_age),
            "record_age": _rounded(self.record_age),
            "seconds_left": _rounded(self.seconds_left),
            "update_seconds": self.update_seconds,
            "saved_step": self.saved,
            "saved_age": _rounded(self.saved_age),
            "loss": _number(self.loss),
            "val_loss": _number(self.val_loss),
            "host": holder.host if holder else None,
            "pid": holder.pid if holder else None,
            "job": (holder.job or None) if holder else None,
            "command": holder.command if holder else None,
            "since": holder.since if holder else None,
            "problems": list(self.problems),
        }


def found_in(given: Sequence[Path]) -> list[Path]:
    """Return the runs that folders are or contain, also those of a study or sweep; and folders that
    cannot be read, which may be runs. Raises UserError for one that has none."""
    runs = []
    for folder in given:
        try:
            inside = [folder] if _may_be_run(folder) else _inside(folder)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} is not a folder: name a run, or one with runs") from None
        except OSError as error:
            where = error.filename or folder
            raise UserError(f"{where} cannot be read: {error.strerror}") from None
        require(bool(inside), f"{folder} is not a run, and contains none: name runs/NAME or runs")
        runs += inside
    return runs


def states(runs: Sequence[Path]) -> list[State]:
    """Return the state of each run, after some seconds if a process elsewhere must be watched."""
    return [_state_of(RunDir(run), signs) for run, signs in zip(runs, watched(runs), strict=True)]


def _inside(folder: Path) -> list[Path]:
    """Return the runs in a folder, and those of a study or sweep that it is or contains."""
    runs: list[Path] = []
    for path in sorted(folder.iterdir()):
        if _may_be_run(path):
            runs.append(path)
        elif path.name in _GROUPS or _is_leased(path):
            runs += _inside(path) if path.is_dir() else []
    return runs


def _may_be_run(folder: Path) -> bool:
    """Return whether a folder has what only runs have, or cannot be read."""
    run = RunDir(folder)
    try:
        if not folder.is_dir():
            return False
        if any(path.exists() for path in (run.config, run.metrics, run.private)):
            return True
        # A run that is being created has only its lease; studies and sweeps have the same kind.
        return _is_leased(folder) and not any((folder / name).is_dir() for name in _GROUPS)
    except OSError:
        return True


def _is_leased(folder: Path) -> bool:
    try:
        return lease_file.newest(folder, ".lease-") is not None
    except OSError:
        return False


def _state_of(run: RunDir, signs: Signs) -> State:
    try:
        return _state(run, signs)
    except OSError as error:
        problem = f"{run.root} cannot be read: {error.strerror}; make it readable for this user"
        return State(run=run.root, phase="unknown", signs=signs, problems=(problem,))


def _state(run: RunDir, signs: Signs) -> State:
    problems: list[str] = []
    if not os.access(run.root, os.R_OK):
        problems.append(f"{run.root} cannot be listed: whether a process holds it is not known")
    settings = _settings(run, problems)
    tail = read_tail(run.metrics)
    if tail.problem:
        problems.append(tail.problem)
    saves = {kind: _saved(run, kind, tail, problems) for kind in _KINDS}
    train_steps = _whole(settings, "train", "steps")
    phase = _phase(run, tail, saves, train_steps)
    kind: Kind = "discover" if phase == "discovery" else "train"
    saved, saved_at = saves[kind]
    now = time.time()
    moments = [m for m in (signs.written, tail.written, saved_at) if m is not None]
    age = now - max(moments) if moments else None
    if age is not None and age < -FRESH_SECONDS:
        problems.append(
            f"files were written {-age:,.0f} s after this host's clock: the ages here are wrong"
        )
        age = 0.0 if signs.alive and not signs.silent else None
    return State(
        run=run.root,
        phase=phase,
        step=max(tail.step(kind), saved or 0),
        steps=_whole(settings, "mask", "max_steps") if phase == "discovery" else train_steps,
        signs=signs,
        sign_age=None if age is None else max(0.0, age),
        record_age=None if tail.written is None else max(0.0, now - tail.written),
        saved=saved,
        saved_age=None if saved_at is None else max(0.0, now - saved_at),
        loss=tail.value(kind, "loss"),
        val_loss=tail.value(kind, "val_loss"),
        update_seconds=tail.update_seconds(),
        problems=tuple(dict.fromkeys(problems)),
    )


def _phase(run: RunDir, tail: Tail, saves: Mapping[Kind, Saved], steps: int | None) -> Phase:
    trained = saves["train"][0]
    if trained is not None and steps is not None and trained >= steps:
        return "finished"
    if trained is not None or any(record["phase"] == "train" for record in tail.records):
        return "pretraining"
    if os.path.exists(run.ticket / _TICKET_FILE):  # False in a folder closed to this user
        return "pretraining"
    return "discovery" if tail.records or saves["discover"][0] else "starting"


def _saved(run: RunDir, kind: Kind, tail: Tail, problems: list[str]) -> Saved:
    """Return update and time of the newest checkpoint that is intact as far as its manifest says;
    of a private folder that is closed, the update that metrics record."""
    recorded = tail.value(kind, "save_seconds")
    try:
        found, newer = shelf.glance(run, kind)
    except UserError as error:
        problems.append(str(error))
        return (recorded[0] if recorded else None), None
    problems += map(str, newer)
    if found is not None:
        with contextlib.suppress(OSError):  # deleted a moment ago
            return found[1].step, (found[0] / MANIFEST_FILE).stat().st_mtime
    # Discovery's are deleted once there is a ticket.
    if recorded is not None and kind == "train":
        problems.append(f"{run.checkpoints} has no checkpoint, but one was saved")
    return None, None


def _settings(run: RunDir, problems: list[str]) -> dict[str, Any]:
    if not run.config.exists():
        return {}
    try:
        return read_settings(run.config, str(run.config))
    except UserError as error:
        problems.append(str(error))
        return {}


def _whole(settings: dict[str, Any], section: str, name: str) -> int | None:
    """Return a whole number among the settings; of another pmp-ds, it may be elsewhere."""
    found = settings.get(section)
    value = found.get(name) if isinstance(found, dict) else None
    return value if type(value) is int else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _number(value: Value | None) -> float | str | None:
    """Return a number that JSON has, or its name."""
    if value is None:
        return None
    return value[1] if math.isfinite(value[1]) else str(value[1])
