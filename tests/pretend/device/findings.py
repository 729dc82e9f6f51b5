"""What the device finds, with the Python lines that caused it, and what it counts.

with watch() as watched:
    ...
watched.of("wait")
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

MACHINERY = Path(__file__).parent
REPO = MACHINERY.parents[2]
DEPTH = 6  # lines of a stack

Kind = Literal["wait", "late", "device", "race", "lifetime"]
"""`late`: the host waits for an event that later launches follow, so the device has work."""
LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    kind: Kind
    what: str
    stack: tuple[str, ...]
    """`package/file.py:line`, innermost first, without torch and the standard library; empty in
    autograd's own threads."""

    @property
    def place(self) -> str:
        return self.stack[0] if self.stack else "autograd"

    @property
    def owner(self) -> str:
        """The package whose line it is: pmp_ds, deepspeed, transformers, tests."""
        return self.place.partition("/")[0]


def _counts() -> list[int]:
    import torch

    found: list[int] = torch.ops.pretend.counts()
    return found


@dataclass
class Watched:
    """What was found and counted since the beginning."""

    findings: list[Finding] = field(default_factory=list)
    _since: list[int] = field(default_factory=_counts)

    def of(self, kind: Kind) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind == kind]

    @property
    def launches(self) -> int:
        return _counts()[0] - self._since[0]

    @property
    def bytes_moved(self) -> int:
        """Bytes that kernels read and wrote."""
        return _counts()[1] - self._since[1]

    @property
    def bytes_held(self) -> int:
        """Bytes of the device's tensors now."""
        return _counts()[2]

    @property
    def peak_bytes(self) -> int:
        """The most bytes of tensors at one time."""
        return _counts()[3]


_watched: list[Watched] = []  # nested: all of them get every finding


@contextlib.contextmanager
def watch() -> Iterator[Watched]:
    """Record within; the peak of memory starts anew."""
    import torch

    torch.ops.pretend.reset_peak()
    watched = Watched()
    _watched.append(watched)
    try:
        yield watched
    finally:
        _watched[:] = [other for other in _watched if other is not watched]


@LISTENER
def listener(kind: bytes, what: bytes) -> None:
    """Take a finding from the device."""
    if _watched:
        finding = Finding(kind.decode(), what.decode(), stack())  # type: ignore[arg-type]  # a Kind
        for watched in _watched:
            watched.findings.append(finding)


def stack() -> tuple[str, ...]:
    """Return this thread's Python lines, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    found: list[str] = []
    while frame is not None and len(found) < DEPTH:
        name = _name(Path(frame.f_code.co_filename))
        if name is not None:
            found.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(found)


def _name(file: Path) -> str | None:
    if "site-packages" in file.parts:
        inside = file.parts[len(file.parts) - file.parts[::-1].index("site-packages") :]
        return None if inside[0] == "torch" else "/".join(inside)
    if file.is_relative_to(REPO) and MACHINERY not in file.parents:
        return str(file.relative_to(REPO))
    return None
