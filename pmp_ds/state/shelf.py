"""Find, delete and set aside the checkpoints of a run.

    private/checkpoints/update-00000500/           a checkpoint (checkpoint.py)
    private/checkpoints/update-00000500.damaged/   a checkpoint that a start could not read
    private/checkpoints.unreadable-1/              all of them, set aside by --start-afresh

Finding changes nothing. An unreadable checkpoint is never deleted before enough newer ones are
readable.
"""

import contextlib
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from pmp_ds.errors import UserError
from pmp_ds.formats import FormatError
from pmp_ds.run_dir import RunDir, fsync_dir, make_private, write_bytes, write_text
from pmp_ds.state.manifest import NAMES, DamagedError, Phase, Position, listed, verified

LATEST = "latest"
AFRESH = "--start-afresh"
WAY_OUT = (
    f"restore one from a backup, or train with {AFRESH}, which sets them aside and begins "
    "again at update 0"
)
_NAME = re.compile(r"(discover|update)-(\d{8})")
_DAMAGED = re.compile(r"(discover|update)-(\d{8})\.damaged(-\d+)?")

Found = tuple[Path, Position]


class UnreadableError(UserError):
    """A run has or had checkpoints, and none of them is readable."""


@dataclass(frozen=True)
class Survey:
    """The result of a search for a phase's checkpoints."""

    found: Found | None
    """The newest intact one."""

    passed_over: tuple[Path, ...]
    """Newer ones that are damaged."""


def survey(run: RunDir, phase: Phase, part: str = "") -> Survey:
    """Find the newest intact checkpoint of a phase, hashing every file whose name starts with
    ``part``.

    Newer damaged ones are reported. Raises UnreadableError when there are checkpoints but none is
    readable, and FormatError if a newer one has another format.
    """
    problems: list[UserError] = []
    folders = _folders(run, phase)
    for folder in folders:
        try:
            position = verified(folder, part)
        except (DamagedError, FormatError) as error:
            problems.append(error)
            continue
        for problem in problems:
            if isinstance(problem, FormatError):
                raise problem
        for problem in problems:
            print(f"warning: {problem}; trying the one before it", flush=True)
        return Survey((folder, position), tuple(folders[: len(problems)]))
    if problems:
        number = f"{len(folders)} checkpoint{'s' * (len(folders) > 1)}"
        head = f"{run.checkpoints} has {number}, but none is readable; nothing was changed:"
        raise UnreadableError("\n  ".join([head, *map(str, problems), WAY_OUT]))
    return Survey(None, ())


def glance(run: RunDir, phase: Phase) -> tuple[Found | None, list[UserError]]:
    """Return a phase's newest checkpoint whose manifest is intact, without reading the files that
    it lists, and the errors of newer ones. Ones deleted meanwhile are passed over."""
    problems: list[UserError] = []
    for folder in _folders(run, phase):
        try:
            return (folder, listed(folder)[0]), problems
        except UserError as error:
            if folder.exists():
                problems.append(error)
    return None, problems


def find(
    run: RunDir, step: int | None = None, phase: Phase = "train", part: str = ""
) -> Found | None:
    """Return what ``survey`` finds, or the checkpoint of update ``step``.

    With ``step``, raises UserError when that checkpoint is damaged or missing.
    """
    if step is None:
        return survey(run, phase, part).found
    folders = _folders(run, phase)
    for folder in folders:
        if step_of(folder) == step:
            return folder, verified(folder, part)
    have = ", ".join(str(step_of(folder)) for folder in folders) or "none"
    raise UserError(f"{run.root} has no checkpoint of update {step}; it has: {have}")


def set_aside(folder: Path) -> Path:
    """Rename an unreadable checkpoint, so that it is never considered again."""
    names = (f"{folder.name}.damaged{f'-{n}' * (n > 1)}" for n in count(1))
    target = next(path for path in map(folder.with_name, names) if not path.exists())
    folder.rename(target)
    fsync_dir(folder.parent)
    return target


def start_afresh(run: RunDir) -> Path:
    """Set all checkpoints and a copy of the metrics aside; return the new folder.

    A single rename does it. A process killed before it leaves the checkpoints in place; one killed
    after it leaves none, and the copy of the metrics is safe.
    """
    make_private(run.checkpoints)
    if run.metrics.exists():
        write_bytes(run.checkpoints / run.metrics.name, run.metrics.read_bytes(), private=True)
    names = (f"{run.checkpoints.name}.unreadable-{n}" for n in count(1))
    target = next(path for path in map(run.private.joinpath, names) if not path.exists())
    run.checkpoints.rename(target)
    fsync_dir(run.private)
    make_private(run.checkpoints)
    return target


def mend(run: RunDir) -> None:
    """Point `latest` at the newest checkpoint, in case a process was killed in between."""
    names = [folder.name for phase in NAMES for folder in _folders(run, phase)]
    newest = max(names, default=None)  # `update` sorts after `discover`
    latest = run.checkpoints / LATEST
    with contextlib.suppress(OSError):  # only people read it: no reason to stop a run
        if newest is None:
            latest.unlink(missing_ok=True)
        elif not latest.exists() or latest.read_bytes() != f"{newest}\n".encode():
            write_text(latest, newest + "\n", private=True)


def prune(
    run: RunDir, phase: Phase, keep_last: int, keep_every: int = 0, written: str | None = None
) -> None:
    """Delete a phase's checkpoints except the newest ``keep_last`` readable ones, those of every
    ``keep_every``-th update, and ``written``.

    Unreadable ones do not count and stay. One that was set aside as damaged is deleted once
    ``keep_last`` newer ones are readable.
    """
    readable = [folder for folder in _folders(run, phase) if _is_listed(folder)]
    for folder in readable[keep_last:]:
        kept = keep_every and step_of(folder) % keep_every == 0
        if not kept and folder.name != written:
            _remove(folder)
    for folder in _matching(run, _DAMAGED, phase):
        if sum(step_of(other) > step_of(folder) for other in readable) >= keep_last:
            _remove(folder)
    mend(run)


def most_at_once(saves: int, every: int, keep_last: int, keep_every: int = 0) -> int:
    """Return the most checkpoints that exist while a phase writes ``saves`` of them, one after
    ``every`` updates: those that ``prune`` leaves, and the one being written."""
    old = max(0, saves - 1 - keep_last) * every  # the last update beyond the newest checkpoints
    return keep_last + 1 + (old // math.lcm(every, keep_every) if keep_every else 0)


def step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2][:8])


def has_any(run: RunDir, phase: Phase | None = None) -> bool:
    """Return whether ``phase``, or any phase, has a checkpoint, readable or not."""
    return any(_folders(run, one) for one in NAMES if phase in (None, one))


def last_step(run: RunDir) -> int:
    """Return the update of the newest checkpoint of any phase, readable or not; 0 if none."""
    return max((step_of(folder) for phase in NAMES for folder in _folders(run, phase)), default=0)


def _folders(run: RunDir, phase: Phase) -> list[Path]:
    """Return all folders with the name of a checkpoint, newest first, readable or not."""
    return sorted(_matching(run, _NAME, phase), reverse=True)


def _matching(run: RunDir, name: re.Pattern[str], phase: Phase) -> list[Path]:
    try:
        entries = [Path(entry) for entry in os.scandir(run.checkpoints)]
    except FileNotFoundError:
        return []
    except OSError as error:  # unreadable is not the same as empty
        raise UserError(
            f"{run.checkpoints} cannot be read: {error.strerror}; make it readable for this user"
        ) from None
    return [path for path in entries if (m := name.fullmatch(path.name)) and m[1] == NAMES[phase]]


def _is_listed(folder: Path) -> bool:
    """Return whether the manifest is intact and its files exist; they are not read."""
    try:
        _, files = listed(folder)
    except UserError:
        return False
    return all((folder / name).is_file() for name in files)


def _remove(folder: Path) -> None:
    """Rename and delete a checkpoint, so that an interrupted deletion leaves no apparent one. Files
    that another process has open on NFS cannot be deleted: they are left to a later start."""
    aside = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(aside, ignore_errors=True)  # of an earlier try
    with contextlib.suppress(OSError):
        folder = folder.replace(aside)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        print(f"warning: {folder} cannot be deleted yet: in use?", file=sys.stderr, flush=True)
