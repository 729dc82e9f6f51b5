"""What a signal does to a command that trains, from its first line to its last.

A scheduler sends SIGTERM (or SLURM's SIGUSR1, or a person Ctrl-C's SIGINT) and waits. Before there
is anything to save the process ends at once, with code 75: imports, a store being hashed and ranks
that wait for each other hold nobody up. In training the run is asked to stop (watch/stop.py). Once
all is saved, further signals are ignored.

A thread hears them, since a main thread inside a collective or an import runs no handler.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from pmp_ds.errors import EXIT_REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LEAVE_SECONDS = 2.0
"""For the farewells of a process that ends at once."""

Reaction = Callable[[signal.Signals], None]
Farewell = Callable[[int, str], None]  # exit code, and what is on screen
_farewells: list[Farewell] = []
_listening = False


def leave(number: signal.Signals) -> None:
    """End now: nothing of this start has to be saved."""
    text = f"{number.name} before there was anything to save; the same command goes on"
    end_at_once(EXIT_REQUEUE, f"stopped: {text}")


def ignore(number: signal.Signals) -> None:
    """All is saved, and the process is about to end."""


_reaction: Reaction = leave


def end_at_once(code: int, text: str, *, everyone: bool = False) -> NoReturn:
    """Say the farewells, for at most a moment, and end the process; rank 0 or ``everyone`` prints
    ``text``. From any thread."""
    farewells = _farewells[::-1]  # the last that was entered first, as contexts end

    def say() -> None:
        for farewell in farewells:
            with contextlib.suppress(Exception):
                farewell(code, text)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    thread.join(LEAVE_SECONDS)
    if everyone or os.environ.get("RANK", "0") == "0":
        tell(text)
    os._exit(code)


@contextlib.contextmanager
def farewell(action: Farewell) -> Iterator[None]:
    """While it is entered, ``action(code, text)`` runs before ``end_at_once`` ends the process."""
    _farewells.append(action)
    try:
        yield
    finally:
        _farewells.remove(action)


@contextlib.contextmanager
def reacting(reaction: Reaction, *, then: Reaction | None = None) -> Iterator[None]:
    """While it is entered, signals call ``reaction`` in a thread; afterwards ``then``, or what they
    called before."""
    global _reaction
    before, _reaction = _reaction, reaction
    try:
        with listening():
            yield
    finally:
        _reaction = then if then is not None and _listening else before


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within it signals reach the reaction instead of killing. A second one inside changes nothing.
    The main thread enters it."""
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
    """On standard error, also while another thread holds its lock."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())
