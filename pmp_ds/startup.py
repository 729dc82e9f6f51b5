"""The parts of a start and their durations, for the line that rank 0 prints at its first update."""

import time

import psutil

_ended: list[tuple[str, float]] = []  # parts, and when each ended, in seconds since 1970
_over = False


def passed(part: str) -> None:
    """Note that a part of the start ends now; it began where the part before it ended."""
    if not _over:
        _ended.append((part, time.time()))


def at_first_update() -> str | None:
    """Return in words how long this process took to its first update, by parts; None if it was told
    before."""
    global _over
    if _over:
        return None
    passed("first update")
    _over = True
    begin = last = psutil.Process().create_time()
    parts = []
    for name, end in _ended:
        parts.append(f"{name} {end - last:.1f} s")
        last = end
    return f"first update after {last - begin:.1f} s: {', '.join(parts)}"
