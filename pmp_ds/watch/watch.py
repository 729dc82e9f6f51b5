"""The watchers of everything that one command trains."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from pmp_ds import dist
from pmp_ds.run_dir import RunDir
from pmp_ds.watch.stop import StopRequest
from pmp_ds.watch.watchdog import Watchdog


@dataclass(frozen=True)
class Watch:
    stop: StopRequest
    dog: Watchdog
    channel: dist.SideChannel


@contextlib.contextmanager
def watching(
    run: RunDir, max_seconds: float, hang_seconds: float, started: float
) -> Iterator[Watch]:
    """Provide a context in which signals and the time limit, ``max_seconds`` after ``started``
    (monotonic), request a stop, and ``hang_seconds`` without progress end the process.
    Collective."""
    with (
        dist.SideChannel() as channel,
        StopRequest(max_seconds, started, channel) as stop,
        Watchdog(run, hang_seconds) as dog,
    ):
        yield Watch(stop, dog, channel)
