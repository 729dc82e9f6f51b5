"""Print the table of crafted inputs, or the result of each input of one kind.

Every kind has a worker of its own, so that its memory is measured separately.
"""

import sys
import time
from collections import Counter, defaultdict

from pmp_ds.errors import shown
from tests.helpers.crafted.corpus import inputs
from tests.helpers.crafted.kinds import KINDS
from tests.helpers.crafted.runner import Outcome, outcomes

HEAD = (
    "kind",
    "inputs",
    "work",
    "refused",
    "tracebacks",
    "hangs",
    "not printable",
    "ran code",
    "peak MB",
    "longest CPU s",
)


def main(kinds: list[str], text: str, verbose: bool) -> int:
    found: dict[str, list[Outcome]] = defaultdict(list)
    clock = time.perf_counter()
    for kind in kinds:
        for outcome in outcomes([(kind, one.name) for one in inputs(kind) if text in one.name]):
            found[kind].append(outcome)
            if verbose or not outcome.good:
                print(_told(outcome), flush=True)
    rows = [_row(kind, found[kind]) for kind in kinds]
    rows.append(_row("all", [one for kind in kinds for one in found[kind]]))
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(f"{time.perf_counter() - clock:.0f} s")
    return int(any(not one.good for kind in kinds for one in found[kind]))


def _told(one: Outcome) -> str:
    used = f"{one.seconds:.1f} s, {one.megabytes:.0f} MB"
    return shown(f"{one.kind}, {one.name}: {one.what}, {used}: ") + one.said


def _row(name: str, found: list[Outcome]) -> tuple[str, ...]:
    counts = Counter(one.what for one in found)
    return (
        name,
        str(len(found)),
        str(counts["works"]),
        str(counts["refused"]),
        str(counts["traceback"] + counts["crash"]),
        str(counts["hang"]),
        str(counts["unprintable"]),
        str(sum(one.ran for one in found)),
        f"{max((one.megabytes for one in found), default=0):.0f}",
        f"{max((one.seconds for one in found), default=0):.1f}",
    )


if __name__ == "__main__":
    kind, text = [*sys.argv[1:], "", ""][:2]
    sys.exit(main([kind] if kind else list(KINDS), text, bool(kind)))
