"""Asked to stop: by a signal, by the clock, or by the guard. All ranks stop after the same update.

A scheduler sends SIGTERM (or SLURM's SIGUSR1, or a person Ctrl-C's SIGINT) and waits; the run
finishes its update, saves and exits with code 75. Who signals again, cannot wait: the process ends
at once, and the last complete checkpoint is what the next start finds. A launcher that is gone
counts as a signal: `deepspeed` on one node dies of SIGTERM and leaves its ranks to themselves.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from pmp_ds import dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
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
        self._launchers = [p for p in psutil.Process().parents() if _is_launcher(p)]
        self._handlers: list[tuple[signal.Signals, Any]] = []

    def ask(self, reason: str) -> None:
        """Stop after this update, on all ranks."""
        self._reason = self._reason or reason

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long: the time limit leaves room for another."""
        self._longest_save = max(self._longest_save, seconds)
        self._last = time.monotonic()

    def agreed(self) -> str | None:
        """Called by every rank after every update: why to stop now, the same on all ranks."""
        now = time.monotonic()
        self._longest_update = max(self._longest_update, now - self._last)
        self._last = now
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            if not all(_is_alive(process) for process in self._launchers):
                self.ask("the launcher is gone")
        if now + 2 * (self._longest_update + self._longest_save) > self._deadline:
            self.ask(f"run.max_time={self._limit:g} s is nearly over")
        asking = self._channel.all_gather_numbers([float(self._reason is not None)])
        if not asking.any():
            return None
        reasons = self._channel.all_gather(self._reason)
        return next(reason for reason in reasons if reason is not None)

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            self._handlers.append((number, signal.signal(number, self._on_signal)))
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers:
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def _listen(self) -> None:
        """Hear signals also while the main thread waits in a collective, where no handler runs."""
        first = 0.0
        with self._reader:
            while numbers := self._reader.recv(1):
                if numbers[0] not in SIGNALS:
                    continue
                now, name = time.monotonic(), signal.Signals(numbers[0]).name
                if first and now - first > REPEAT_SECONDS:
                    _tell("asked again: ending at once; the last complete checkpoint is intact")
                    os._exit(128 + numbers[0])
                if not first:
                    first = now
                    self.ask(name)
                    if os.environ.get("RANK", "0") == "0":
                        _tell(f"{name}: saving after this update; signal again to end at once")


def _tell(text: str) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())


def _is_alive(process: psutil.Process) -> bool:
    """False also for one that nobody has waited for yet."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _is_launcher(process: psutil.Process) -> bool:
    """The `deepspeed` command, or what it starts on every node."""
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        return "deepspeed.launcher.launch" in command or any(
            Path(word).name == "deepspeed" for word in command[:2]
        )
    return False
