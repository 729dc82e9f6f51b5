"""Ends a run that another rank has left, or that makes no progress, and says so on screen.

A rank that dies, is stopped, or whose machine is gone leaves the others waiting in a collective,
on a GPU for many minutes. So a thread of every rank keeps in touch with those of the others over a
process group of its own, and another one expects a sign of progress from the main thread.
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from pmp_ds import dist
from pmp_ds.errors import EXIT_FAULT
from pmp_ds.run_dir import RunDir

TOUCH_SECONDS = 1.0
"""Between two messages to the other ranks."""

GRACE_SECONDS = 3.0
"""How long a rank waits for its own error to be told, or for the stacks of the others."""


class Watchdog:
    """A context in which this process ends with code 70 when another rank is gone, or without a
    ``beat`` for ``limit`` seconds (0: never), counted from the first one on. Collective."""

    def __init__(self, run: RunDir, limit: float) -> None:
        self._folder, self._limit = run.stacks, limit
        self._doing, self._last = "", 0.0
        self._leaving, self._over = threading.Event(), threading.Event()
        self._channel = dist.SideChannel()
        duties = [self._expect_progress] if limit > 0 else []
        if dist.world_size() > 1:
            duties.append(self._keep_in_touch)
        self._threads = [threading.Thread(target=duty, daemon=True) for duty in duties]

    def beat(self, doing: str) -> None:
        """Progress: from now on this rank is ``doing`` something."""
        self._doing, self._last = doing, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._stacks(dist.rank()).unlink(missing_ok=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the other ranks to leave as well, unless this one fails."""
        self._leaving.set()
        if error is not None or dist.world_size() == 1:
            self._over.set()
        for thread in self._threads:
            thread.join(timeout=None if error is None else 0.0)
        if error is None:
            self._channel.close()

    def _keep_in_touch(self) -> None:
        """Until all ranks leave."""
        try:
            while not self._channel.all_gather_numbers([float(self._leaving.is_set())]).all():
                if self._over.wait(TOUCH_SECONDS):
                    return
        except RuntimeError:
            if self._over.wait(GRACE_SECONDS):
                return
            self._end(f"another rank is gone while this one was in {self._doing or 'its start'}")
        self._over.set()

    def _expect_progress(self) -> None:
        while not self._over.wait(min(TOUCH_SECONDS, self._limit / 4)):
            if self._last and time.monotonic() - self._last > self._limit:
                self._give_up()

    def _give_up(self) -> None:
        """Tell where every rank hangs. One that is stopped cannot; that its stacks are missing
        tells who it was."""
        self._folder.mkdir(exist_ok=True)
        with open(self._stacks(dist.rank()), "w", encoding="utf-8") as file:
            file.write(f"rank {dist.rank()}, {self._doing}:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(GRACE_SECONDS)
        silent = [r for r in range(dist.world_size()) if not self._stacks(r).exists()]
        blame = f"; rank {', '.join(map(str, silent))} wrote none" if silent else ""
        self._end(
            f"no progress for {self._limit:g} s in {self._doing}: the stacks of the ranks are in "
            f"{self._folder}{blame}"
        )

    def _end(self, reason: str) -> None:
        print(
            f"fault: rank {dist.rank()}: {reason}. The last checkpoint is intact, the same command "
            "goes on from it",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_FAULT)

    def _stacks(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"
