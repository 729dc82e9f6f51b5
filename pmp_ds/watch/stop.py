"""Asked to stop: by a signal, by the clock, or by the guard. All ranks stop after the same update:
that a rank is asked travels with the loss of an update, which every rank reads.

A scheduler sends a signal and waits; the run finishes its update, saves and exits with code 75.
Whoever signals again cannot wait: the process ends at once, and the last complete checkpoint is
what the next start finds. Once all is saved, signals are ignored. A launcher that is gone counts as
a signal: `deepspeed` on one node dies of SIGTERM and leaves its ranks to themselves.
"""

import contextlib
import os
import signal
import time

import psutil

from pmp_ds import dist, signals
from pmp_ds.launchers import is_launcher
from pmp_ds.signals import tell

REPEAT_SECONDS = 1.0
"""Launchers send two signals at once; only one that comes later than this is a second request."""
LOOK_SECONDS = 1.0
"""Between two looks at the launchers, which read files of /proc."""


class StopRequest:
    """A context: within it, signals ask instead of kill.

    ``seconds``: time until the run has to be over, counted from ``started`` (monotonic seconds).
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
        """Stop after this update, on all ranks."""
        self._reason = self._reason or reason

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long: the time limit leaves room for another."""
        self._longest_save = max(self._longest_save, seconds)
        self._last = time.monotonic()

    def asked(self) -> float:
        """1 when this rank is asked to stop, else 0. Called in every update."""
        now = time.monotonic()
        self._longest_update = max(self._longest_update, now - self._last)
        self._last = now
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            if not all(_is_alive(process) for process in self._launchers):
                self.ask("the launcher is gone")
        # It is read one update later, and the update after that is saved.
        if now + 4 * self._longest_update + 2 * self._longest_save > self._deadline:
            self.ask(f"run.max_time={self._limit:g} s is nearly over")
        return float(self._reason is not None)

    def reason(self) -> str:
        """Why to stop now, the same on all ranks, some of which are ``asked``. Collective."""
        reasons = self._channel.all_gather(self._reason)
        return next(reason for reason in reasons if reason is not None)

    def done(self) -> None:
        """All is saved: what is still signalled is ignored."""
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
            tell("asked again: ending at once; the last complete checkpoint is intact")
            os._exit(128 + number)
        if self._first is None:
            self._first = now
            self.ask(number.name)
            if os.environ.get("RANK", "0") == "0":
                tell(f"{number.name}: saving after the next update; signal again to end at once")


def _is_alive(process: psutil.Process) -> bool:
    """False also for one that nobody has waited for yet."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _starts_ranks(process: psutil.Process) -> bool:
    """The `deepspeed` command, or what starts the ranks of a machine."""
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        return is_launcher(command) or any(
            word.rpartition("/")[2] == "deepspeed" for word in command[:2]
        )
    return False
