"""Keep the ranks of a job together from their meeting to their end.

A rank that dies, is suspended or loses its machine leaves the others waiting in a collective: on a
GPU for many minutes, on a cut network as long as the kernel retries. So every rank gives a sign of
life each second where the ranks met, and watches those of the others. A rank that ends because of a
mistake or a signal leaves its last words there.
"""

import json
import threading
import time

from torch.distributed import Store

from pmp_ds import dist, signals
from pmp_ds.errors import EXIT_FAULT
from pmp_ds.meeting import Meeting

TOUCH_SECONDS = 1.0
"""Seconds between two signs of life."""

GRACE_SECONDS = 3.0
"""Seconds that a rank waits for its own error to be reported, or for the words of the others."""

_WORDS = "last words"


class Lifeline:
    """A context in which this process ends when another rank is gone, left with last words, or gave
    no sign of life for ``limit`` seconds (0: no limit). Collective."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._leaving, self._over = threading.Event(), threading.Event()
        self._lost = threading.Event()
        self._threads: list[threading.Thread] = []
        meeting = dist.meeting()
        if meeting is None:
            return
        self._meeting = meeting
        self._channel = dist.SideChannel()
        self._store = meeting.another_connection()
        now = time.monotonic()
        watched = range(1, dist.world_size()) if meeting.rank == 0 else (0,)
        self._signs = dict.fromkeys(watched, (0, now))
        """For the ranks watched by this one: their counter, and when it last grew."""
        self._words: str | None = None
        duties = (self._keep_in_touch, self._give_signs, self._watch)
        self._threads = [threading.Thread(target=duty, daemon=True) for duty in duties]

    def __enter__(self) -> "Lifeline":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the other ranks to leave as well, unless this one fails."""
        if not self._threads:
            return
        self._leaving.set()
        if kind is None:
            for thread in self._threads:
                thread.join()
            self._channel.close()
        else:
            self._over.set()

    def explain(self) -> None:
        """End this process, which found that another rank is gone, with what the others know."""
        self._lost.set()
        for thread in self._threads:
            thread.join(3 * GRACE_SECONDS)

    def _keep_in_touch(self) -> None:
        """Run until all ranks leave. A connection breaks at once when a process dies."""
        try:
            while not self._channel.all_gather_numbers([float(self._leaving.is_set())]).all():
                if self._over.wait(TOUCH_SECONDS):
                    return
        except RuntimeError:
            self._lost.set()
            return
        self._over.set()

    def _give_signs(self) -> None:
        count, rank = 0, self._meeting.rank
        try:
            while not self._over.wait(TOUCH_SECONDS if count else 0.0):
                count += 1
                self._store.set(f"sign/{rank}", str(count))
                for other in [r for r in self._signs if self._store.check([f"sign/{r}"])]:
                    theirs = int(self._store.get(f"sign/{other}"))
                    if theirs > self._signs[other][0]:
                        self._signs[other] = theirs, time.monotonic()
                if self._store.check([_WORDS]):
                    self._words = self._store.get(_WORDS).decode()
        except RuntimeError:  # rank 0, which keeps the store, is gone
            self._lost.set()

    def _watch(self) -> None:
        while not self._over.wait(TOUCH_SECONDS / 2):
            if self._words is None and not self._lost.is_set():
                silent = self._silent(self._limit) if self._limit > 0 else []
                if silent:
                    self._end(f"{self._named(silent)} gave no sign of life for {self._limit:g} s")
                continue
            if self._over.wait(GRACE_SECONDS):
                return  # this rank has its own error to report
            if self._words is not None:
                words = json.loads(self._words)
                signals.end_at_once(words["code"], words["text"])
            # Its last sign may have been seen some time after it was given.
            until = time.monotonic() + GRACE_SECONDS
            while not (silent := self._silent(GRACE_SECONDS)) and time.monotonic() < until:
                time.sleep(TOUCH_SECONDS / 10)
            self._end(f"{self._named(silent) if silent else 'another rank'} is gone")

    def _silent(self, seconds: float) -> list[int]:
        """Return the watched ranks without a sign for ``seconds``."""
        now = time.monotonic()
        return [rank for rank, (_, last) in self._signs.items() if now - last > seconds]

    def _named(self, ranks: list[int]) -> str:
        return ", ".join(self._meeting.name(rank) for rank in ranks[:3])

    def _end(self, reason: str) -> None:
        text = f"{reason}. The last checkpoint is intact; the same command resumes"
        signals.end_at_once(EXIT_FAULT, f"fault: rank {self._meeting.rank}: {text}", everyone=True)


def last_words(meeting: Meeting, store: Store, code: int, text: str) -> None:
    """Tell the other ranks this one's exit code and reason; only the first words count.

    ``text`` is the text for the screen: `stopped: ...` or `error: ...`.
    """
    kind, _, reason = text.partition(": ")
    words = {"code": code, "text": f"{kind}: {meeting.name(meeting.rank)}: {reason}"}
    store.compare_set(_WORDS, "", json.dumps(words))
