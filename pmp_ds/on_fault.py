"""Run the user's command `guard.on_fault` when a run ends without being done: by a fault, a
mistake, a stop of the guard, or a request.

It runs where the reason is printed, after it, at most once per start and for ``SECONDS`` at most.
Nothing that it does changes the exit code. Several ranks can notice the same fault, on several
hosts: once they share the run's folder, the first to create a file there runs the command.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pmp_ds import errors, signals

SECONDS = 30.0
"""Seconds that the command may take."""

_LONGEST = 4000  # characters of a reason

# Detached: launchers end all descendants of a rank once another rank has ended. Standard output
# carries the exit code alone.
_SCRIPT = '{ /bin/sh -c "$1" >&2; echo $?; } &'


@dataclass
class _Hook:
    command: str
    run: Path
    marker: Path
    shared: bool = False
    over: bool = False


_hook: _Hook | None = None


def watch(command: str | None, run: Path, marker: Path) -> None:
    """Run ``command`` (None: nothing) with a shell when this process ends badly from now on.

    ``marker`` is the file in the folder ``run`` that only the first rank creates.
    """
    global _hook
    _hook = None if command is None else _Hook(command, run.absolute(), marker)
    errors.when_it_ends(_ended)


def forget() -> None:
    """Remove the mark of an earlier start. Rank 0 alone."""
    if _hook is not None:
        _hook.marker.unlink(missing_ok=True)


def shared() -> None:
    """Let any rank run the command from now on: all share the run's folder, without a mark."""
    if _hook is not None:
        _hook.shared = True


def environment(run: Path, code: int, reason: str) -> dict[str, str]:
    """Return what the command learns of the end; the reason is one line."""
    return {
        "PMP_DS_RUN": str(run),
        "PMP_DS_CODE": str(code),
        "PMP_DS_REASON": " ".join(reason.split())[:_LONGEST],
        "PMP_DS_RANK": os.environ.get("RANK", "0"),
        "PMP_DS_HOST": socket.gethostname(),
    }


def _ended(code: int, reason: str, wait: bool) -> None:
    hook = _hook
    if hook is None or hook.over:
        return
    hook.over = True
    if not _is_ours(hook):
        return
    given = {**os.environ, **environment(hook.run, code, reason)}
    with signals.ignoring():  # a scheduler's or launcher's, which would change the exit code
        problem = _run(hook.command, given, SECONDS if wait else 0.0)
    if problem and wait:
        signals.tell(f"warning: guard.on_fault: the command {problem}")


def _is_ours(hook: _Hook) -> bool:
    """Return whether this rank runs the command: the first of the ranks that share the folder. A
    folder that is out of reach leaves it to rank 0."""
    is_first = os.environ.get("RANK", "0") == "0"
    if hook.shared:
        try:
            os.close(os.open(hook.marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return False
        except OSError:
            return is_first
        return True
    return is_first


def _run(command: str, given: Mapping[str, str], seconds: float) -> str | None:
    """Run ``command`` and return what went wrong in words, or None."""
    shell = subprocess.Popen(
        ["/bin/sh", "-c", _SCRIPT, "on_fault", command],
        env=given,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert shell.stdout is not None
    shell.wait()
    deadline, said = time.monotonic() + seconds, b""
    while not said.endswith(b"\n"):
        if not select.select([shell.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if seconds:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)
            return f"did not end within {seconds:g} s and was killed"
        if not (part := os.read(shell.stdout.fileno(), 64)):
            return "was killed"
        said += part
    return None if said == b"0\n" else f"ended with code {said.decode().strip()}"
