"""Stop requests from a signal, the clock or the guard. All ranks stop after the same update,
because each rank's request travels with the loss of an update, which every rank reads.

A scheduler sends a signal and waits: the run finishes its update, saves and exits with code 75. A
second signal ends the process at once, and the next start finds the last complete checkpoint. Once
everything is saved, signals are ignored. A lost launcher counts as a signal, because `deepspeed` on
one node dies of SIGTERM and abandons its ranks.
"""

import contextlib
import os
import signal
import time

import psutil

from pmp_ds import dist, signals
from pmp_ds.errors import ended
from pmp_ds.launchers import is_launcher
from pmp_ds.signals import tell

REPEAT_SECONDS = 1.0
"""Launchers send two signals at once; only a later one is a second request."""
LOOK_SECONDS = 1.0
"""Seconds between two checks of the launchers, which read files in /proc."""


class StopRequest:
    """A context in which signals request a stop instead of killing the process.

    ``seconds``: the run's time limit, counted from ``started`` (monotonic seconds).
    """

    def __init__(self, seconds: float, started: float, channel: dist.SideChannel) -> None:
        self._limit, self._deadline = seconds, started + seconds
        self._channel = channel
        self._reason: str | None = None
        self._longest_update = self._longest_save = 0.0
        self._last = self._next_look = time.monotonic()
        self._launchers = [p for p in psutil.Process().parents() if _starts_ranks(p)]
        self._first: float | None = None  # when the first signal came
        self._over = False
        self._context = contextlib.ExitStack()

    def ask(self, reason: str) -> None:
        """Request a stop of all ranks after this update."""
        self._reason = self._reason or reason

    def saved(self, seconds: float) -> None:
        """Record how long a checkpoint took; the time limit leaves room for another."""
        self._longest_save = max(self._longest_save, seconds)
        self._last = time.monotonic()

    def asked(self) -> float:
        """Return 1 if this rank has a stop request, else 0. Called in every update."""
        now = time.monotonic()
        self._longest_update = max(self._longest_update, now - self._last)
        self._last = now
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            if not all(_is_alive(process) for process in self._launchers):
                self.ask("the launcher is gone")
        # The request is read one update later, and the update after that is saved.
        if now + 4 * self._longest_update + 2 * self._longest_save > self._deadline:
            self.ask(f"run.max_time={self._limit:g} s is nearly over")
        return float(self._reason is not None)

    def reason(self) -> str:
        """Return the reason to stop, the same on all ranks, at least one of which is ``asked``.
        Collective."""
        reasons = self._channel.all_gather(self._reason)
        return next(reason for reason in reasons if reason is not None)

    def done(self) -> None:
        """Ignore signals from now on, because everything is saved."""
        self._over = True

    def __enter__(self) -> "StopRequest":
        self._context.enter_context(signals.reacting(self._on_signal, then=signals.ignore))
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._over:
            return
        now = time.monotonic()
        if self._first is not None and now - self._first > REPEAT_SECONDS:
            text = "second signal: ending at once; the last complete checkpoint is intact"
            tell(text)
            if os.environ.get("RANK", "0") == "0":
                ended(128 + number, text, wait=False)
            os._exit(128 + number)
        if self._first is None:
            self._first = now
            self.ask(number.name)
            if os.environ.get("RANK", "0") == "0":
                tell(f"{number.name}: saving after the next update; signal again to end at once")


def _is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie does not."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _starts_ranks(process: psutil.Process) -> bool:
    """Return whether a process is the `deepspeed` command or starts the ranks of a machine."""
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        return is_launcher(command) or any(
            word.rpartition("/")[2] == "deepspeed" for word in command[:2]
        )
    return False
