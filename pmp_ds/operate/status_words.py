"""The state of runs in words: a screen for one, a table for several."""

from collections.abc import Sequence

from pmp_ds.errors import shown
from pmp_ds.operate.status import State, Value

_COLUMNS = ("run", "phase", "update", "alive", "left", "saved", "loss")
_NO_UPDATE = ("starting", "unknown")


def screen(state: State) -> str:
    """Return some lines about one run."""
    of = f" of {state.steps:,}" if state.steps is not None else ""
    most = "at most " if state.phase == "discovery" and of else ""
    share = f" ({state.step / state.steps:.0%})" if state.steps and not most else ""
    where = f", update {state.step:,}{of.replace('of ', f'of {most}')}{share}"
    lines = [f"{state.run}: {state.phase}{where if state.phase not in _NO_UPDATE else ''}"]
    rows = {"process": _process(state), "last record": _ago(state.record_age)}
    if state.seconds_left is not None and state.phase != "finished":
        rows["time left"] = (
            f"{duration(state.seconds_left)} at {state.update_seconds:.3g} s per update, "
            "and measurements and saves"
        )
    rows["last save"] = _save(state)
    rows["loss"] = _losses(state)
    lines += [f"  {name:<12}{text}" for name, text in rows.items() if text]
    lines += [f"  warning: {problem}" for problem in state.problems]
    return "\n".join(map(shown, lines))


def table(states: Sequence[State]) -> str:
    """Return one line for each run, under a head, and the warnings."""
    rows = [_COLUMNS, *map(_row, states)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [f"warning: {s.run}: {problem}" for s in states for problem in s.problems]
    return "\n".join(map(shown, lines))


def duration(seconds: float) -> str:
    """Return `45 s`, `12 min`, `3.5 h` or `2.0 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def _row(state: State) -> tuple[str, ...]:
    left = state.seconds_left if state.phase != "finished" else None
    step = f"{state.step:,}" if state.phase != "unknown" else "-"
    return (
        str(state.run),
        state.phase,
        f"{step}/{state.steps:,}" if state.steps is not None else step,
        _alive(state),
        "-" if left is None else duration(left),
        "-" if state.saved is None else f"{state.saved:,}",
        "-" if state.loss is None else f"{state.loss[1]:.4f}",
    )


def _alive(state: State) -> str:
    if state.phase == "unknown":
        return "-"
    if state.signs.silent:
        return "silent"
    return "yes" if state.signs.alive else "no"


def _process(state: State) -> str:
    holder, last = state.signs.holder, _ago(state.sign_age)
    if state.phase == "unknown":
        return ""
    if state.signs.silent:
        silent = duration(state.sign_age) if state.sign_age is not None else "an unknown time"
        return f"runs on this host, but silent for {silent}: {holder}"
    if state.signs.alive:
        return f"alive: {holder}"
    if holder is not None:
        return f"NOT ALIVE: {holder}; last sign of life {last or 'unknown'}"
    if state.phase == "finished":
        return "none; the run is finished"
    return f"none; the same command resumes. Last sign of life {last or 'unknown'}"


def _save(state: State) -> str:
    if state.saved is None:
        return "none yet" if state.phase != "unknown" else ""
    since = state.step - state.saved
    age = f", {_ago(state.saved_age)}" if state.saved_age is not None else ""
    return f"update {state.saved:,}{age}" + (f"; {since:,} updates since" if since > 0 else "")


def _losses(state: State) -> str:
    texts = [_at(state.loss, ""), _at(state.val_loss, "validation ")]
    return ", ".join(text for text in texts if text)


def _at(value: Value | None, what: str) -> str:
    return f"{what}{value[1]:.4f} at update {value[0]:,}" if value else ""


def _ago(age: float | None) -> str:
    return "" if age is None else f"{duration(age)} ago"
