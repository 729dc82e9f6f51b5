"""Signs of life of the process that holds a folder, seen from any host; nothing is written.

    signs = watched([Path("runs/a"), Path("runs/b")])

A holder on this machine is looked up. Of one elsewhere, the counter in its lease must have been
written a moment ago, or grow while it is watched: so a clock that is wrong kills nobody. One here
whose counter does neither is alive, but silent: suspended, or waiting for its file system.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmp_ds import lease_file
from pmp_ds.lease import BEAT_SECONDS
from pmp_ds.lease_file import Holder

FRESH_SECONDS = 2 * BEAT_SECONDS
"""A lease written so recently, by this host's clock, needs no watching."""

WATCH_SECONDS = 2 * BEAT_SECONDS + 1.5
_POLL_SECONDS = 0.2
_PREFIX = ".lease-"


@dataclass(frozen=True)
class Signs:
    """What is known of the process that holds a folder."""

    holder: Holder | None
    """None: nobody, or a lease that is only half written."""

    alive: bool
    written: float | None
    """When the lease was last written, as `time.time`; now, if it grew while it was watched."""

    silent: bool = False
    """It runs on this machine and was watched, but wrote nothing."""


NOBODY = Signs(None, False, None)


def watched(folders: Sequence[Path]) -> list[Signs]:
    """Return the signs of life in each folder, after at most WATCH_SECONDS for all of them."""
    firsts = [_look(folder) for folder in folders]
    found = [_at_once(first) for first in firsts]
    until = time.monotonic() + WATCH_SECONDS
    while None in found and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        for index, first in enumerate(firsts):
            if found[index] is None and first is not None:
                found[index] = _changed(folders[index], first)
    return [
        signs or (_unchanged(first) if first else NOBODY)
        for signs, first in zip(found, firsts, strict=True)
    ]


@dataclass(frozen=True)
class _Look:
    path: Path
    holder: Holder | None
    beats: int
    written: float


def _look(folder: Path) -> _Look | None:
    """Return the newest lease of ``folder``, None if there is none."""
    try:
        path = lease_file.newest(folder, _PREFIX)
        if path is None:
            return None
        found, written = lease_file.read(path), path.stat().st_mtime
    except OSError:  # released a moment ago, or a folder that this user cannot read
        return None
    holder, beats = found if found is not None else (None, -1)
    return _Look(path, holder, beats, written)


def _at_once(look: _Look | None) -> Signs | None:
    """Return what is clear without watching, or None."""
    if look is None:
        return NOBODY
    if look.holder is not None and look.holder.is_here and not lease_file.runs(look.holder):
        return Signs(look.holder, False, look.written)
    if look.holder is not None and abs(time.time() - look.written) < FRESH_SECONDS:
        return Signs(look.holder, True, look.written)
    return None


def _changed(folder: Path, first: _Look) -> Signs | None:
    """Return the signs if the lease differs from the first look, or None."""
    now = _look(folder)
    if now is None:  # released meanwhile
        return NOBODY
    if now.holder is not None and (now.path, now.beats) != (first.path, first.beats):
        return Signs(now.holder, True, time.time())
    return None


def _unchanged(look: _Look) -> Signs:
    """Return the signs of a holder that was watched and wrote nothing."""
    holder = look.holder
    runs = holder is not None and holder.is_here and lease_file.runs(holder)
    return Signs(holder, runs, look.written, silent=runs)
