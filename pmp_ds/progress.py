"""A progress bar on a terminal, an occasional line with the time (UTC) elsewhere, nothing on ranks
above 0.

for document in progress(documents, "tokenize", "document"): ...

with Progress("train", "update", total=20000, initial=start) as bar:
    bar.set(loss=f"{loss:.3f}")
    bar.update()
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from pmp_ds import verbosity

T = TypeVar("T")

_LINE = (
    "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}{unit} [{elapsed}, {rate_fmt}{postfix}]"


class Progress:
    """Counts ``unit``s towards ``total`` (None: unknown) and shows rate and time left.

    On a terminal it is tqdm's bar, in a log file a line at most every ``interval`` seconds
    and one at the end. Rates start at ``initial``, the work done before this process.
    """

    def __init__(
        self,
        desc: str,
        unit: str,
        total: int | None = None,
        *,
        initial: int = 0,
        scale: bool = False,
        disable: bool = False,
        interval: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        """Start counting; ``scale`` prints 12.3M for 12300000, ``stream`` is standard error."""
        self.desc, self.unit, self.total = desc, unit, total
        self.n = self.initial = initial
        self._scale, self._interval = scale, interval
        self._stream = sys.stderr if stream is None else stream
        self._fields: dict[str, Any] = {}
        self._enabled = not disable and os.environ.get("RANK", "0") == "0" and verbosity.informs()
        self._start = self._last_line = time.monotonic()
        self._shown = -1
        self._bar: tqdm[Any] | None = None
        if self._enabled and self._stream.isatty():
            self._bar = tqdm(
                desc=desc,
                unit=f" {unit}",
                total=total,
                initial=initial,
                unit_scale=scale,
                file=self._stream,
                dynamic_ncols=True,
                leave=True,
            )

    def update(self, n: int = 1) -> None:
        """Count ``n`` more."""
        self.n += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._enabled and time.monotonic() - self._last_line >= self._interval:
            self._print_line()

    def set(self, **fields: Any) -> None:
        """Show these fields after the counter from now on, with earlier ones."""
        self._fields.update(fields)
        if self._bar is not None:
            self._bar.set_postfix(self._fields, refresh=False)

    def close(self) -> None:
        """Show the last state; further calls do nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self.n != self._shown and self.n > self.initial:
            self._print_line()
        self._enabled, self._bar = False, None

    def _print_line(self) -> None:
        self._last_line, self._shown = time.monotonic(), self.n
        line = tqdm.format_meter(
            self.n,
            self.total,  # type: ignore[arg-type]  # the stubs do not allow None, tqdm does
            self._last_line - self._start,
            prefix=self.desc,
            unit=f" {self.unit}",
            unit_scale=self._scale,
            initial=self.initial,
            postfix=", ".join(f"{key}={value}" for key, value in self._fields.items()) or None,
            bar_format=_LINE if self.total else _LINE_WITHOUT_TOTAL,
        )
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        print(stamp, line, file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def progress(
    items: Iterable[T], desc: str, unit: str, total: int | None = None, disable: bool = False
) -> Iterator[T]:
    """Yield ``items`` under a ``Progress``; ``total`` defaults to their length if they have one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(desc, unit, total, disable=disable) as bar:
        for item in items:
            yield item
            bar.update()
