"""Let one process at a time write to a folder, on one machine or on several that share it.

    with hold(run.root, "the run"): ...

A lease is a small file `.lease-N` with its holder and a counter that grows every few seconds. A
process takes over by creating `.lease-(N+1)`, which only one process can do, even on network file
systems without locks. Clocks of other machines are not trusted: a lease is stale if its counter did
not grow during STALE_SECONDS of watching. A holder on this machine is looked up instead.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from pmp_ds import lease_file, signals
from pmp_ds.errors import EXIT_FAULT, UserError
from pmp_ds.lease_file import DIGITS, Holder
from pmp_ds.run_dir import eventually

BEAT_SECONDS = 3.0
"""Seconds between two signs of life of a holder."""

STALE_SECONDS = 60.0
"""A holder on another machine loses its lease after so many seconds without a sign."""


class Lease:
    """A lease held by this process, until ``release``."""

    def __init__(self, path: Path, holder: Holder, what: str) -> None:
        self.path, self.holder = path, holder
        self._what = what
        self._over = threading.Event()
        self._beats = 0
        _held.append(self)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lease; others may take it at once."""
        self._over.set()
        if self in _held:
            _held.remove(self)
        if self._thread is not threading.current_thread():
            self._thread.join(BEAT_SECONDS)
        found = lease_file.read(self.path)
        if found is not None and found[0].token == self.holder.token:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the file system is away; the next beat decides
                if not self._still_mine():
                    break
                self._beats += 1
                lease_file.write(self.path, self.holder, self._beats)
        if not self._over.is_set():
            self._end()

    def confirm(self) -> None:
        """End this process if the lease was lost; called before work that must not happen twice."""
        if not self._still_mine():
            self._end()

    def _end(self) -> NoReturn:
        signals.end_at_once(
            EXIT_FAULT,
            f"fault: {self._what} was taken over by another process while this one gave no sign "
            f"for {STALE_SECONDS:g} s; this one writes nothing more",
        )

    def _still_mine(self) -> bool:
        newest = lease_file.newest(self.path.parent, self.path.name[:-DIGITS])
        if newest is None:  # removed by hand
            lease_file.create(self.path, self.holder)
            return True
        found = lease_file.read(self.path)
        return newest == self.path and (found is None or found[0].token == self.holder.token)


_held: list[Lease] = []  # by this process


def confirm(folder: Path) -> None:
    """End this process if it has lost its lease on ``folder``; without a lease do nothing."""
    for lease in _held:
        if lease.path.parent == folder:
            lease.confirm()


@contextlib.contextmanager
def hold(folder: Path, what: str, *, prefix: str = "") -> Iterator[Lease]:
    """Hold the lease on ``folder``, or on ``prefix`` in it; ``what`` names it in errors.

    Missing folders are created, and removed again if they stay empty. Raises UserError that names
    the current holder; waits up to STALE_SECONDS for a sign of one on another machine, and says so.
    """
    made = _make(folder, what)
    try:
        lease = _acquire(folder, f".{prefix}lease-", what)
    except OSError as error:
        _unmake(made)
        raise UserError(f"{what} cannot be written: {error}") from None
    except BaseException:
        _unmake(made)
        raise
    try:
        with signals.farewell(lambda *_: lease.release()):
            yield lease
    finally:
        lease.release()
        _unmake(made)


def is_seen(path: Path, token: str, seconds: float = 30.0) -> bool:
    """Return whether this machine sees the lease that another one took."""

    def there() -> bool:
        found = lease_file.read(path)
        return found is not None and found[0].token == token

    return eventually(there, path, seconds)


def _acquire(folder: Path, start: str, what: str) -> Lease:
    mine = Holder.of_this_process()
    while True:
        newest = lease_file.newest(folder, start)
        if newest is not None:
            _wait_until_stale(newest, what)
        number = 1 if newest is None else int(newest.name[len(start) :]) + 1
        path = folder / f"{start}{number:0{DIGITS}d}"
        try:
            lease_file.create(path, mine)
        except FileExistsError:
            continue  # another process was faster, or left: look again
        for older in lease_file.numbered(folder, start):
            if older < path:
                older.unlink(missing_ok=True)
        return Lease(path, mine, what)


def _wait_until_stale(path: Path, what: str) -> None:
    """Return when nobody holds the lease any more. Raises UserError if somebody does."""
    first = seen = lease_file.read(path)
    if first is not None and first[0].is_here:
        if lease_file.runs(first[0]):
            raise UserError(_taken(what, first[0]))
        return
    began, told = time.monotonic(), False
    while time.monotonic() - began < STALE_SECONDS:
        time.sleep(BEAT_SECONDS / 4)
        if not path.exists():
            return
        seen = lease_file.read(path) or seen
        if seen is not None and first is not None and seen != first:
            raise UserError(_taken(what, seen[0]))
        first = first or seen
        if not told and time.monotonic() - began > 2 * BEAT_SECONDS:
            told = True
            who = f"by {first[0]}" if first else "by a process that did not write who it is"
            print(
                f"{what} was last held {who}, which gives no sign of life: taking it over in "
                f"{STALE_SECONDS - (time.monotonic() - began):.0f} s",
                file=sys.stderr,
                flush=True,
            )


def _taken(what: str, holder: Holder) -> str:
    text = f"{what} is in use by {holder}: wait for it or stop it."
    if holder.is_here:  # while its process runs, it keeps its hold
        return text
    return f"{text} (After {STALE_SECONDS:g} s without a sign of life it would lose its hold.)"


def _make(folder: Path, what: str) -> list[Path]:
    """Create the missing folders and return them, the outermost first."""
    try:
        missing = [f for f in [*reversed(folder.parents), folder] if not f.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error}") from None
    return missing


def _unmake(made: list[Path]) -> None:
    for folder in reversed(made):
        with contextlib.suppress(OSError):  # it is no longer empty
            folder.rmdir()
