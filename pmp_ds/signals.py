"""The effect of signals on a command that trains, from its first line to its last.

A scheduler sends SIGTERM (or SLURM's SIGUSR1, or a user's Ctrl-C SIGINT) and waits. Before there is
anything to save, the process ends at once with code 75: imports, hashing a store and waiting for
other ranks delay nobody. During training the run is asked to stop (watch/stop.py). Once everything
is saved, further signals are ignored.

A thread receives them, because a main thread inside a collective or an import runs no handler.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from pmp_ds.errors import EXIT_REQUEUE, ended, reports

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LEAVE_SECONDS = 2.0
"""Seconds for the farewells of a process that ends at once."""

Reaction = Callable[[signal.Signals], None]
Farewell = Callable[[int, str], None]  # receives exit code and text on screen
_farewells: list[Farewell] = []
_listening = False


def leave(number: signal.Signals) -> None:
    """End at once: this start has nothing to save."""
    text = f"{number.name} before there was anything to save; run the same command again"
    end_at_once(EXIT_REQUEUE, f"stopped: {text}")


def ignore(number: signal.Signals) -> None:
    """Ignore a signal: everything is saved, and the process is about to end."""


_reaction: Reaction = leave


def end_at_once(code: int, text: str, *, everyone: bool = False) -> NoReturn:
    """Run the farewells, for a moment at most, and end the process; of several ranks, rank 0 or
    ``everyone`` prints ``text``. May be called from any thread."""
    farewells = _farewells[::-1]  # in reverse order of entry, as contexts end

    def say() -> None:
        for farewell in farewells:
            with contextlib.suppress(Exception):
                farewell(code, text)

    try:
        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        thread.join(LEAVE_SECONDS)
        if everyone or reports():
            tell(text)
            ended(code, text)
    finally:
        os._exit(code)


@contextlib.contextmanager
def farewell(action: Farewell) -> Iterator[None]:
    """Run ``action(code, text)`` before ``end_at_once`` ends the process, inside this context."""
    _farewells.append(action)
    try:
        yield
    finally:
        _farewells.remove(action)


@contextlib.contextmanager
def reacting(reaction: Reaction, *, then: Reaction | None = None) -> Iterator[None]:
    """Make signals call ``reaction`` in a thread inside this context; afterwards ``then``, or what
    they called before."""
    global _reaction
    before, _reaction = _reaction, reaction
    try:
        with listening():
            yield
    finally:
        _reaction = then if then is not None and _listening else before


@contextlib.contextmanager
def ignoring() -> Iterator[None]:
    """Make signals that reach a listening process do nothing inside this context, in any
    thread."""
    global _reaction
    before, _reaction = _reaction, ignore
    try:
        yield
    finally:
        _reaction = before


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Make signals reach the reaction instead of killing, inside this context. The main thread
    enters it; a nested one changes nothing."""
    global _listening
    if _listening:
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handlers: list[tuple[signal.Signals, Any]] = [
        (number, signal.signal(number, lambda *_: None)) for number in SIGNALS
    ]
    threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True).start()
    _listening = True
    try:
        yield
    finally:
        _listening = False
        for number, handler in handlers:
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()


def _listen(reader: socket.socket) -> None:
    with reader:
        while numbers := reader.recv(1):
            if numbers[0] in SIGNALS:
                _reaction(signal.Signals(numbers[0]))


def tell(text: str) -> None:
    """Print on standard error if it can be written, even while another thread holds its lock."""
    with contextlib.suppress(OSError):
        fd = sys.__stderr__.fileno() if sys.__stderr__ else 2
        os.write(fd, f"{text}\n".encode(errors="backslashreplace"))
