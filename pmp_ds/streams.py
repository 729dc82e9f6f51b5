"""Standard output and error that cannot be written: a log on a full disk, a reader that is gone.

forgive("stderr")  # from now on, what cannot be written is dropped
"""

import io
import os
import sys
from typing import Any, Literal


class _Forgiving(io.FileIO):
    """A file that drops what it cannot write."""

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def forgive(name: Literal["stdout", "stderr"]) -> None:
    """Let what cannot be written to a standard stream be lost, without ending the process or
    changing its exit code. Another stream in its place, such as a test's, stays."""
    stream: Any = getattr(sys, name)
    if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
        raw = io.BufferedWriter(_Forgiving(stream.fileno(), "wb", closefd=False))
        replaced = io.TextIOWrapper(
            raw, stream.encoding, "backslashreplace", line_buffering=True, write_through=True
        )
        setattr(sys, name, replaced)


def is_full(stream: Any) -> bool:
    """Whether nothing more can be written to a stream, other than for want of a reader."""
    try:
        stream.write("\n")
        stream.flush()
    except BrokenPipeError:
        return False
    except OSError:
        return True
    return False


def close_stdout() -> None:
    """Drop what else is printed, or Python's last flush would fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
