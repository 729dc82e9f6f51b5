"""End a run that makes no progress, and report where every rank hangs.

A thread of each rank expects signs of progress from the main thread. Lost ranks are detected by
pmp_ds/lifeline.py.
"""

import faulthandler
import threading
import time
from pathlib import Path

from pmp_ds import dist
from pmp_ds.errors import EXIT_FAULT
from pmp_ds.run_dir import RunDir
from pmp_ds.signals import end_at_once

LOOK_SECONDS = 1.0
"""Seconds between two checks of the main thread."""

GRACE_SECONDS = 3.0
"""Seconds that a rank waits for the stacks of the others."""


class Watchdog:
    """A context in which the process ends with code 70 if ``limit`` seconds (0: no limit) pass
    without a ``beat``, counted from the first one."""

    def __init__(self, run: RunDir, limit: float) -> None:
        self._folder, self._limit = run.stacks, limit
        self._doing, self._last = "", 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._expect_progress, daemon=True)

    def beat(self, doing: str) -> None:
        """Report progress: this rank is now ``doing`` something."""
        self._doing, self._last = doing, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._stacks(dist.rank()).unlink(missing_ok=True)
        if self._limit > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _expect_progress(self) -> None:
        while not self._over.wait(min(LOOK_SECONDS, self._limit / 4)):
            if self._last and time.monotonic() - self._last > self._limit:
                self._give_up()

    def _give_up(self) -> None:
        """Report where every rank hangs; missing stacks identify a rank that is suspended."""
        where = str(self._folder)
        try:
            self._folder.mkdir(exist_ok=True)
            with open(self._stacks(dist.rank()), "w", encoding="utf-8") as file:
                file.write(f"rank {dist.rank()}, {self._doing}:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            time.sleep(GRACE_SECONDS)
            silent = [r for r in range(dist.world_size()) if not self._stacks(r).exists()]
        except OSError as error:  # a full disk, a share that is gone: the run ends all the same
            faulthandler.dump_traceback(2, all_threads=True)
            where, silent = f"the log, as {where} cannot be written ({error.strerror})", []
        blame = f"; rank {', '.join(map(str, silent))} wrote none" if silent else ""
        text = (
            f"no progress for {self._limit:g} s in {self._doing}: the stacks of the ranks are in "
            f"{where}{blame}. The last checkpoint is intact; the same command resumes"
        )
        end_at_once(EXIT_FAULT, f"fault: rank {dist.rank()}: {text}", everyone=True)

    def _stacks(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"
