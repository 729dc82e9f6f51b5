"""Files that others may have written: read whole within bounds, or refused in one line.

    values = read_object(path)        {"a": 1}; fields.py declares the types of the fields

Only regular files of bounded size are read: a FIFO cannot block, nor /dev/zero run forever. JSON is
UTF-8 and at most DEEPEST deep, without repeated keys or numbers of more than 40 digits.
"""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmp_ds.errors import UserError

MOST_BYTES = 64 << 20
"""Maximum bytes of a text file: the index of a model of half a million tensors."""
DEEPEST = 64
_MOST_DIGITS = 40


class ForeignError(UserError):
    """A file that cannot be read, or has unexpected content."""


class MissingError(ForeignError):
    """The file does not exist."""


def read_bytes(
    path: Path, most: int = MOST_BYTES, *, only: int | None = None, pipe: bool = False
) -> bytes:
    """Return the content, or its first ``only`` bytes, of a regular file of at most ``most`` bytes,
    or with ``pipe`` of a pipe named by the user. Raises ForeignError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | (0 if pipe else os.O_NONBLOCK)
    try:
        fd = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ForeignError(f"{path} cannot be read: {_reason(error)}") from None
    try:
        status = os.fstat(fd)
        regular = _check_kind(path, status, pipe)
        length = status.st_size if regular else most
        too_long = length > most
        with open(fd, "rb", closefd=False) as file:  # read(n) takes n bytes of memory at once
            content = b"" if too_long else file.read(length + 1 if only is None else only)
    except OSError as error:
        raise ForeignError(f"{path} cannot be read: {_reason(error)}") from None
    finally:
        os.close(fd)
    if too_long or len(content) > most:
        raise _too_long(path, most)
    return content


def require_regular(path: Path, most: int) -> None:
    """Raise ForeignError unless ``path`` is a regular file of at most ``most`` bytes, which another
    function can then open."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ForeignError(f"{path} cannot be read: {_reason(error)}") from None
    _check_kind(path, status)
    if status.st_size > most:
        raise _too_long(path, most)


def _check_kind(path: Path, status: os.stat_result, pipe: bool = False) -> bool:
    """Return whether it is a regular file, and raise ForeignError if neither that nor a pipe that
    is allowed."""
    regular = stat.S_ISREG(status.st_mode)
    if not (regular or (pipe and stat.S_ISFIFO(status.st_mode))):
        raise ForeignError(f"{path} is not a regular file")
    return regular


def _too_long(path: Path, most: int) -> ForeignError:
    return ForeignError(f"{path} is longer than {most:,} bytes, the maximum for such a file")


def read_text(path: Path, most: int = MOST_BYTES, *, pipe: bool = False) -> str:
    """Return the text of ``read_bytes``. Raises ForeignError, also if it is not UTF-8."""
    try:
        return read_bytes(path, most, pipe=pipe).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ForeignError(f"{path} is not UTF-8 (byte {error.start:,})") from None


def read_object(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ForeignError."""
    try:
        return parse_object(read_text(path, most))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise ForeignError(f"{path} is damaged: {error}") from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the object in JSON ``text``. Raises ValueError as ``parse`` does."""
    found = parse(text)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def parse(text: str | bytes) -> Any:
    """Return the value of JSON ``text``. Raises ValueError without quoting any of it."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} (line {error.lineno})") from None
    except UnicodeError:
        raise ValueError("it is not UTF-8, or has half of a surrogate pair") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    _check_depth(found)
    return found


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice in an object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has more than {_MOST_DIGITS} digits")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _inside(value: Any) -> list[Any]:
    """Return the objects and lists directly inside ``value``."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in inner if isinstance(one, dict | list)]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
