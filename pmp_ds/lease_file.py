"""The file of a lease, with its holder and a counter (lease.py).

It is created exclusively and then overwritten in place, which also works on network file systems
without locks. Readers open it anew each time, so that they ask the server.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pmp_ds.errors import UserError
from pmp_ds.fields import fit
from pmp_ds.foreign import read_object
from pmp_ds.launchers import job_in_words, start_ticks

DIGITS = 6  # of a lease's number
_WIDTH = 1024  # bytes of the file, so that each sign of life overwrites the one before


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The content of a lease file, without its counter."""

    token: str
    """Random, for this lease alone."""

    machine: str
    """Boot id and process namespace, in which ``pid`` is unique."""

    host: str
    pid: int
    started: int
    """`launchers.start_ticks` of the process."""

    command: str
    job: str
    """`SLURM job 17`, or empty."""

    since: str
    """UTC, for people."""

    def __str__(self) -> str:
        job = f", {self.job}" if self.job else ""
        return f"{self.command} on host {self.host}, pid {self.pid}{job}, since {self.since}"

    @property
    def is_here(self) -> bool:
        """Whether it is or was a process of this machine."""
        return self.machine == machine()

    @classmethod
    def of_this_process(cls) -> "Holder":
        pid = os.getpid()
        return cls(
            token=secrets.token_hex(8),
            machine=machine(),
            host=socket.gethostname()[:64],
            pid=pid,
            started=start_ticks(pid),
            command=Path(sys.argv[0]).name[:64],
            job=job_in_words()[:64],
            since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        )


def newest(folder: Path, start: str) -> Path | None:
    """Return the lease file with the highest number whose name begins with ``start``."""
    return max(numbered(folder, start), default=None)


def numbered(folder: Path, start: str) -> list[Path]:
    """Return all lease files whose names begin with ``start``."""
    pattern = re.compile(re.escape(start) + rf"\d{{{DIGITS}}}")
    return [folder / name for name in os.listdir(folder) if pattern.fullmatch(name)]


def create(path: Path, holder: Holder) -> None:
    """Take a lease. Raises FileExistsError when another process was faster."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    try:
        write(path, holder, 0)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def write(path: Path, holder: Holder, beats: int) -> None:
    """Write a sign of life in place: on NFS the next open elsewhere sees it, while a rename may
    stay hidden for a minute."""
    text = json.dumps(asdict(holder) | {"beats": beats}, sort_keys=True)
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, text.ljust(_WIDTH).encode(), 0)
        if not beats:
            os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path) -> tuple[Holder, int] | None:
    """Return the holder and its counter, or None if the file is missing or half written."""
    try:
        values = read_object(path)
        beats: int = fit(int, values.pop("beats", None), path)
        holder: Holder = fit(Holder, values, path)
    except UserError:
        return None
    return holder, beats


def machine() -> str:
    """Return this boot of this machine and its process namespace, in which pids are unique."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def runs(holder: Holder) -> bool:
    """Return whether a holder on this machine still runs."""
    with contextlib.suppress(OSError):
        return start_ticks(holder.pid) == holder.started
    return False
