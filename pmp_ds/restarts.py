"""Restart a rank after a fault: its process starts the real one and watches it.

Each rank does so by itself, on any number of nodes and under any launcher. When one rank dies, the
others notice within seconds and end as well, and all of them meet again at the next port.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from pmp_ds import signals
from pmp_ds.errors import EXIT_MISTAKE, EXIT_REQUEUE, ended
from pmp_ds.launchers import DEFAULT_PORT

CHILD = "PMP_RESTARTS_CHILD"
"""Environment variable that distinguishes the real process from the one that watches it."""

_FINAL = (0, EXIT_MISTAKE, EXIT_REQUEUE)


def is_child() -> bool:
    """Return whether this is the real process, which ends with the one that watches it."""
    if CHILD in os.environ:
        _die_with_parent()
    return CHILD in os.environ


def run_with_restarts(command: Sequence[str], restarts: int) -> int:
    """Run ``command`` until it is done, made a mistake or was asked to stop; after any other end
    rerun it, at most ``restarts`` times. Returns its last exit code, 128 + n after signal n."""
    asked: signal.Signals | None = None
    child: subprocess.Popen[bytes] | None = None

    def forward(number: signal.Signals) -> None:
        nonlocal asked
        asked = number
        if child is not None:
            child.send_signal(number)

    first_port = int(os.environ.get("MASTER_PORT", DEFAULT_PORT))
    code = 0
    environment = {**os.environ, CHILD: "1"}
    with signals.reacting(forward):
        for attempt in range(restarts + 1):
            if attempt and "RANK" in environment:
                # Another port each time, so as not to meet a rank of the last attempt. Only rank 0
                # listens there, not torchrun's agent.
                environment["MASTER_PORT"] = str(first_port + attempt)
                environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            child = subprocess.Popen(command, env=environment)
            if asked is not None:  # before there was a process to signal
                child.send_signal(asked)
            code = child.wait()
            if code in _FINAL or asked or attempt == restarts:
                break
            print(
                f"restart {attempt + 1} of {restarts}: rank {os.environ.get('RANK', '0')} ended "
                f"with {_describe(code)}",
                file=sys.stderr,
                flush=True,
            )
    if code < 0 and os.environ.get("WORLD_SIZE", "1") == "1":  # else another rank notices
        ended(128 - code, f"fault: rank 0: ended by {_describe(code)}")
    return code if code >= 0 else 128 - code


def _describe(code: int) -> str:
    return f"code {code}" if code >= 0 else signal.Signals(-code).name


def _die_with_parent() -> None:
    """Die with a killed watcher, so that it leaves no rank behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
