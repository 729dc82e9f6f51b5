"""The ways a command ends: done, a user's mistake, asked to stop, or a fault of the machine."""

import contextlib
import difflib
import io
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Iterable

from pmp_ds import streams

EXIT_MISTAKE = 1
"""The same command will fail again: something must be changed first."""

EXIT_FAULT = 70
"""A rank, a device or a bug failed: the same command resumes from the last checkpoint."""

EXIT_REQUEUE = 75
"""Stopped on request, all is saved: the same command resumes (EX_TEMPFAIL of sysexits.h)."""


EXIT_READER_GONE = 141
"""The reader of the output closed it: as if SIGPIPE had ended the command."""


class UserError(ValueError):
    """A mistake that the user can fix: names field or file, the value, and the way out."""


class SharedError(UserError):
    """A mistake that every rank raises with the same words."""


def require(ok: bool, message: str) -> None:
    """Raise UserError with ``message`` unless ``ok``."""
    if not ok:
        raise UserError(message)


def require_known(name: str, value: str, known: Collection[str], kinds: str) -> None:
    """Raises UserError, with all names of these ``kinds``, unless ``value`` of the setting or flag
    ``name`` is one of them."""
    given = f"{name} {value!r}" if name.startswith("--") else f"{name}={value!r}"
    guess = did_you_mean(value, known)
    require(value in known, f"{given} is unknown{guess}; the {kinds} are {', '.join(known)}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the nearest of the known words as ` (did you mean X?)`, or nothing where none is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def quoted(path: object) -> str:
    """Return a path for a printed command, ready to be pasted into a shell."""
    return shlex.quote(str(path))


def denied(error: PermissionError) -> str:
    """Return in words that a file or folder belongs to another user."""
    return (
        f"{error.filename}: {error.strerror}; let this user read and write it, or run the "
        "command as its owner"
    )


class Stopped(Exception):
    """The run stopped before its end because it was asked to; its state is saved."""


class LostRankError(RuntimeError):
    """Another rank is gone or did not answer."""


def shown(text: str) -> str:
    """Return ``text`` for a screen: terminal control characters, line ends and changes of writing
    direction are escaped as in Python."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def lines(text: str) -> str:
    """Return a message for a screen, with its further lines indented. Other line ends came from a
    name in it and are escaped."""
    return "\n  ".join(shown(line) for line in text.split("\n  "))


AtEnd = Callable[[int, str, bool], None]
_at_end: AtEnd | None = None


def when_it_ends(action: AtEnd) -> None:
    """Call ``action`` with exit code and text on screen when this process has printed why it ends,
    other than done. Its third argument is whether there is time to wait."""
    global _at_end
    _at_end = action


def ended(code: int, text: str, *, wait: bool = True) -> None:
    """Say that the process is about to end with ``code``, for the reason ``text`` that it
    printed."""
    if _at_end is not None:
        with contextlib.suppress(Exception):  # the exit code and its reason stay what they are
            _at_end(code, text, wait)


_of_ranks = False


def as_rank() -> None:
    """Say that this process is a rank of a job. Where RANK is set around a command of one process,
    as in the pods of a PyTorchJob, it says nothing about who reports a mistake."""
    global _of_ranks
    _of_ranks = True


def reports() -> bool:
    """Return whether this process prints a mistake: a single one, or rank 0 of several."""
    return not _of_ranks or _rank() == "0"


def exit_code(main: Callable[[], None]) -> int:
    """Run ``main`` and return the exit code of the process.

    A ``UserError`` becomes one line on standard error. All ranks of a run have the same mistake, so
    of them (``as_rank``) only rank 0 prints it; a fault may concern a single rank, so each prints
    its own.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Latin-1 terminal, a name that is not UTF-8
            stream.reconfigure(errors="backslashreplace")
    streams.forgive("stderr")
    try:
        _print_all(main)
    except UserError as error:
        _end_on_rank0(EXIT_MISTAKE, f"error: {lines(str(error))}")
        return EXIT_MISTAKE
    except Stopped as stop:
        _end_on_rank0(EXIT_REQUEUE, f"stopped: {lines(str(stop))}")
        return EXIT_REQUEUE
    except LostRankError as error:
        text = f"fault: rank {_rank()}: {lines(str(error))}"
        print(text, file=sys.stderr, flush=True)
        ended(EXIT_FAULT, text)
        return EXIT_FAULT
    except BrokenPipeError:  # the reader, such as `| head`, has finished
        streams.close_stdout()
        return EXIT_READER_GONE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - every bug ends here
        traceback.print_exc()
        ended(EXIT_FAULT, f"fault: rank {_rank()}: {type(error).__name__}: {lines(str(error))}")
        return EXIT_FAULT
    return 0


def _print_all(main: Callable[[], None]) -> None:
    """Run ``main``; a UserError if it needs what another user owns, or if what it prints does not
    fit where it goes."""
    try:
        main()
        sys.stdout.flush()
    except PermissionError as error:
        if error.filename is None:
            raise
        raise UserError(denied(error)) from None
    except OSError as error:
        if error.filename is not None or not streams.is_full(sys.stdout):
            raise
        streams.close_stdout()
        raise UserError(f"standard output cannot be written: {error.strerror}") from None


def _rank() -> str:
    """Return the rank, known late: ``main`` may learn it from srun or mpirun (launchers.py)."""
    return os.environ.get("RANK", "0")


def _end_on_rank0(code: int, text: str) -> None:
    if reports():
        print(text, file=sys.stderr, flush=True)
        ended(code, text)
