"""A command of several ranks, from its first line to its exit code.

    if __name__ == "__main__":
        raise SystemExit(ranks.command(prepare))

Light until needed: signals are received before the heavy imports begin.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pmp_ds import launchers, signals, streams
from pmp_ds.errors import (
    EXIT_FAULT,
    EXIT_MISTAKE,
    LostRankError,
    SharedError,
    UserError,
    as_rank,
    denied,
    exit_code,
)

OTHER_RANKS_WAIT = 20.0
"""Seconds. Launchers kill all ranks when one has failed: rank 0, which reports why, goes first."""

WORDS_SECONDS = 1.5
"""Seconds that rank 0, which keeps the ranks' messages, waits for the others to read them."""


@dataclass(frozen=True)
class Prepared:
    """A rank's task, checked as far as possible without the other ranks."""

    folder: str
    """The run as named by the user, the same on every rank of a job."""

    lost_seconds: float
    """`guard.lost_seconds`."""

    run: Callable[[], None]


_ASKING = {"-h", "--help", "--print-config", "--dry-run"}


def command(prepare: Callable[[], Prepared], argv: Sequence[str] | None = None) -> int:
    """Prepare on every rank, let the ranks meet, and run; return the exit code of the process. Rank
    0 reports a mistake of some ranks, with their names."""
    as_rank()
    words = sys.argv[1:] if argv is None else argv
    asks = any(word.partition("=")[0].replace("_", "-") in _ASKING for word in words)
    with signals.listening():
        code = exit_code(lambda: _command(prepare, asks))
    if code == EXIT_MISTAKE and os.environ.get("RANK", "0") != "0":
        time.sleep(OTHER_RANKS_WAIT)
    return code


def _command(prepare: Callable[[], Prepared], asks: bool) -> None:
    # Broken connections are reported in our words, without torch's stacks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        launchers.adopt()
    except UserError:
        if asks:  # for help or a plan: it ends here, and needs no ranks
            prepare()
        raise
    prepared: Prepared | None = None
    mistake: str | None = None
    try:
        prepared = prepare()
    except (UserError, PermissionError) as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        mistake = denied(error) if isinstance(error, PermissionError) else str(error)
    streams.forgive("stdout")  # from here on it has no result, only news
    from pmp_ds import dist  # imports torch

    try:
        dist.init(prepared.folder if prepared else None, mistake)
        assert prepared is not None
        _run(prepared)
    except PermissionError as error:  # it was permitted before, as on a share whose ticket ended
        raise RuntimeError(denied(error)) from error
    except RuntimeError as error:
        if not dist.is_lost_rank(error):
            raise
        raise LostRankError(
            "another rank is gone; the last checkpoint is intact; the same command resumes"
        ) from error
    finally:
        dist.shutdown()


def _run(prepared: Prepared) -> None:
    from pmp_ds import dist
    from pmp_ds.lifeline import Lifeline, last_words

    meeting = dist.meeting()
    if meeting is None:
        prepared.run()
        return
    connection = meeting.another_connection()

    def tell(code: int, text: str) -> None:
        if code == EXIT_FAULT:  # the others notice a fault by themselves
            return
        last_words(meeting, connection, code, text)
        if meeting.rank == 0:
            time.sleep(WORDS_SECONDS)

    try:
        with signals.farewell(tell), Lifeline(prepared.lost_seconds) as lifeline:
            try:
                prepared.run()
            except RuntimeError as error:
                if dist.is_lost_rank(error):
                    lifeline.explain()
                raise
    except SharedError:
        raise
    except UserError as error:
        tell(EXIT_MISTAKE, f"error: {error}")
        raise
