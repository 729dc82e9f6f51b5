"""Run the checks on this rank, collect those of the others, and judge. Nothing waits for ever.

    findings = examine(CHECKS, here)            on rank 0; {} on the others
    print(table(CHECKS, findings, here))

Each check runs in a thread for `Here.seconds` at most. Rank 0 waits as long again for the others:
a rank that crashed or hangs is named by the first check that it did not answer. A launcher that saw
a rank crash may end the others earlier, by SIGTERM: then they stop waiting and say what they know.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pmp_ds.errors import shown
from pmp_ds.operate import checks, rank_checks
from pmp_ds.operate.checks import Here, Outcome, fail

Findings = dict[str, dict[int, Outcome]]
"""Outcomes by check and rank."""

THREAD = "doctor's check"
_BEHIND = 5.0  # seconds that another rank may be behind rank 0
_SHORT = 0.5  # seconds for a check when this rank was asked to end
_LAST_WAIT = 5.0  # seconds from then on for the others; launchers send SIGKILL after 10 and more
_MOST_LINES = 3  # of failures of one check


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    run: Callable[[Here], Outcome]
    agree: Callable[[Mapping[int, Any]], dict[int, Outcome]] | None = None
    """Failures of ranks whose values do not go with those of the others."""


CHECKS = (
    Check("versions", checks.versions, rank_checks.same_versions),
    Check("clock", rank_checks.clock, rank_checks.same_time),
    Check("shared folder", rank_checks.shared_folder),
    Check("private files", checks.modes),
    Check("home", checks.home),
    Check("shared memory", checks.shm),
    Check("kernel", checks.kernel),
    Check("interface", checks.interface),
    Check("gpu", checks.gpu),
    Check("collective", rank_checks.collective),
    Check("disk", checks.disk),
    Check("store", checks.store, rank_checks.same_data),
)


def examine(table: Sequence[Check], here: Here) -> Findings:
    """Run every check on every rank; return the outcomes on rank 0, and nothing on the others."""
    mine: dict[str, Outcome] = {}
    for check in table:
        mine[check.name] = limited(check.run, here)
        if here.rank != 0:
            with contextlib.suppress(RuntimeError):  # rank 0, which keeps the store, is gone
                here.store.set(_key(check, here.rank), json.dumps(asdict(mine[check.name])))
    if here.rank != 0:
        return {}
    found: Findings = {check.name: {0: mine[check.name]} for check in table}
    until = time.monotonic() + here.seconds + _BEHIND
    for rank in range(1, here.world):
        for check in table:
            outcome = _received(here, _key(check, rank), until)
            if outcome is None:
                found[check.name][rank] = fail(
                    f"no answer {_how_long(here)}: it crashed or hangs there",
                    "look at its output, and whether its host and the network are up",
                )
                break
            found[check.name][rank] = outcome
    for check in table:
        if check.agree is not None:
            outcomes = found[check.name]
            values = {r: o.value for r, o in outcomes.items() if o.value is not None}
            outcomes |= check.agree(values)
    return found


def limited(run: Callable[[Here], Outcome], here: Here) -> Outcome:
    """Return the outcome of a check; one that raises, or takes too long, has failed."""
    done: list[Outcome] = []

    def work() -> None:
        try:
            done.append(run(here))
        except BaseException as error:  # noqa: BLE001 - whatever a broken machine does
            text = str(error).strip().partition("\n")[0] or type(error).__name__
            done.append(fail(text, "see what is wrong on that host"))

    thread = threading.Thread(target=work, name=THREAD, daemon=True)
    began = time.monotonic()
    thread.start()
    while thread.is_alive():
        at = here.asked.at
        until = began + here.seconds if at is None else max(began, at) + _SHORT
        if time.monotonic() > until:
            break
        thread.join(0.05)
    if done:
        return done[0]
    return fail(f"not done {_how_long(here)}", "see what hangs there: a file system, a GPU")


def _how_long(here: Here) -> str:
    if here.asked.at is None:
        return f"within {here.seconds:g} s"
    return "before the ranks were asked to end"


def table(table: Sequence[Check], findings: Findings, here: Here) -> str:
    """Return a line for each check, and for each failure who has it and the way out."""
    lines = []
    for check in table:
        outcomes = findings[check.name]
        failures = {rank: one for rank, one in outcomes.items() if one.state == "FAIL"}
        if not failures:
            first = outcomes[0]
            lines.append(f"{first.state:<8} {check.name:<14} {first.text}")
            continue
        alike: dict[Outcome, list[int]] = {}
        for rank, one in failures.items():
            alike.setdefault(Outcome(one.state, one.text, one.way_out), []).append(rank)
        for one, ranks in list(alike.items())[:_MOST_LINES]:
            lines.append(f"FAIL     {check.name:<14} {_who(ranks, here)}{one.text}")
            lines.append(f"{'':<24}way out: {one.way_out}")
        if len(alike) > _MOST_LINES:
            lines.append(f"{'':<24}and {len(alike) - _MOST_LINES} other failures of this check")
    return "\n".join(map(shown, lines))


def failed(findings: Findings) -> bool:
    return any(one.state == "FAIL" for found in findings.values() for one in found.values())


def _who(ranks: Sequence[int], here: Here) -> str:
    if here.world == 1:
        return ""
    more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    return f"rank {ranks[0]} on host {here.hosts[ranks[0]]}{more}: "


def _key(check: Check, rank: int) -> str:
    return f"doctor/found/{check.name}/{rank}"


def _received(here: Here, key: str, until: float) -> Outcome | None:
    """Return what another rank found, or None if it does not come in time."""
    while not here.store.check([key]):
        at = here.asked.at
        if time.monotonic() > (until if at is None else min(until, at + _LAST_WAIT)):
            return None
        time.sleep(0.02)
    return Outcome(**json.loads(here.store.get(key)))
