"""Changes to one valid file: its type, its bytes, its JSON fields."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Change = Callable[[Path], None]
"""Of the file at a path."""

NASTY = "\x1b[31mred\n  error: \u202etxt|<b>`[x](y)"
"""Text with terminal control codes, a second line, and marks of HTML and Markdown."""

DEEP = 100_000


@dataclass(frozen=True)
class Input:
    """Describe one crafted input; ``craft`` is given a valid copy of the folder of its kind."""

    kind: str
    name: str
    craft: Change
    use: Change | None = None
    """The code that opens it, if not that of its kind."""


def bytes_(content: bytes) -> Change:
    """Set the file's content."""

    def change(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return change


def _replaced(make: Callable[[Path], object]) -> Change:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is at most 107 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def _holes(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(8 << 30)


def _half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _doubled(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(bytes(content))


FILES: dict[str, Change] = {
    "missing": Path.unlink,
    "directory": _replaced(Path.mkdir),
    "fifo": _replaced(os.mkfifo),
    "socket": _replaced(_socket),
    "link to /dev/zero": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "link to /dev/tty": _replaced(lambda path: path.symlink_to("/dev/tty")),
    "link out": _replaced(lambda path: path.symlink_to("/etc/passwd")),
    "link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "link to nothing": _replaced(lambda path: path.symlink_to("nothing")),
    "8 GiB of holes": _holes,
    "empty": bytes_(b""),
    "one byte": bytes_(b"x"),
    "line ends": bytes_(b"\n" * 1000),
    "half": _half,
    "twice": _doubled,
    "a bit flipped": _flipped,
    "not UTF-8": bytes_(b'{"a": "\xff\xfe"}\n'),
    "UTF-16": bytes_('{"a": 1}\n'.encode("utf-16")),
    "zeros": bytes_(b"\0" * 4096),
    "terminal": bytes_(NASTY.encode()),
}

DOCUMENTS: dict[str, Change] = {
    name: bytes_(text.encode("utf-8", "surrogatepass") + b"\n")
    for name, text in {
        "null": "null",
        "true": "true",
        "number": "5",
        "text": '"text"',
        "list": "[]",
        "object": "{}",
        "list of lists": "[[[]]]",
        "NaN": "NaN",
        "minus infinity": "-Infinity",
        "1e999": "1e999",
        "400 digits": "1" + "0" * 400,
        "5000 digits": "1" + "0" * 5000,
        "nested lists": "[" * DEEP,
        "closed nested lists": "[" * DEEP + "]" * DEEP,
        "nested objects": '{"a":' * DEEP,
        "half a character": '{"a": "\\ud800"}',
        "raw surrogate": '{"a": "\ud800"}',
        "two documents": "{} {}",
        "YAML tag": '!!python/object/apply:os.system ["touch ran"]',
    }.items()
}

VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "minus one": -1,
    "2^72": 1 << 72,
    "10^400": 10**400,
    "fraction": 0.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "text": "text",
    "terminal": NASTY,
    "list": [],
    "list of null": [None],
    "object": {},
    "object of null": {"a": None},
    "long text": "x" * 100_000,
}
FEW = ("null", "2^72", "NaN", "terminal", "list", "object")
"""Values for fields below the top."""


def fields(values: Any, depth: int) -> Iterator[tuple[Any, ...]]:
    """Return the paths to every field down to ``depth``; for a list, to its first element."""
    if depth and isinstance(values, dict | list):
        for key in list(values) if isinstance(values, dict) else range(min(1, len(values))):
            yield (key,)
            yield from ((key, *rest) for rest in fields(values[key], depth - 1))


def in_object(values: dict[str, Any], depth: int = 1) -> Iterator[tuple[str, bytes]]:
    """Yield (name, JSON text) for every change to one field of ``values``."""
    for way in fields(values, depth):
        for name in VALUES if len(way) == 1 else FEW:
            yield f"{_spelt(way)} = {name}", _changed(values, way, VALUES[name])
        yield f"{_spelt(way)} missing", _changed(values, way, _changed)
    for key in ("extra", NASTY, ""):
        yield f"key {key[:5]!r} more", json.dumps(values | {key: 1}).encode()
    first = next(iter(values))
    twice = json.dumps({first: None})[:-1] + ", " + json.dumps(values)[1:]
    yield f"{first} twice", twice.encode()


def _spelt(way: tuple[Any, ...]) -> str:
    return ".".join(str(part)[:40] for part in way)


def _changed(values: Any, way: tuple[Any, ...], value: Any) -> bytes:
    changed = json.loads(json.dumps(values))
    place = changed
    for key in way[:-1]:
        place = place[key]
    if value is _changed:
        del place[way[-1]]
    else:
        place[way[-1]] = value
    return json.dumps(changed).encode()
