"""Print the table of crafted inputs, or, for one kind, each of them."""

import sys
import time
from collections import Counter, defaultdict

from tests.helpers.crafted.corpus import inputs
from tests.helpers.crafted.kinds import KINDS
from tests.helpers.crafted.runner import Outcome, outcomes

HEAD = ("kind", "inputs", "work", "refused", "tracebacks", "hangs", "not printable", "ran code",
        "peak MB", "longest s")  # fmt: skip


def main(kinds: list[str], verbose: bool) -> int:
    found: dict[str, list[Outcome]] = defaultdict(list)
    wanted = [(one.kind, one.name) for kind in kinds for one in inputs(kind)]
    clock = time.perf_counter()
    for outcome in outcomes(wanted):
        found[outcome.kind].append(outcome)
        if verbose or not outcome.good:
            print(f"{outcome.kind}, {outcome.name}: {outcome.what} {outcome.said}", flush=True)
    rows = [_row(kind, found[kind]) for kind in kinds]
    rows.append(_row("all", [one for kind in kinds for one in found[kind]]))
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(f"{time.perf_counter() - clock:.0f} s")
    return int(any(not one.good for kind in kinds for one in found[kind]))


def _row(name: str, found: list[Outcome]) -> tuple[str, ...]:
    counts = Counter(one.what for one in found)
    return (
        name, str(len(found)), str(counts["works"]), str(counts["refused"]),
        str(counts["traceback"] + counts["crash"]), str(counts["hang"]),
        str(counts["unprintable"]), str(sum(one.ran for one in found)),
        f"{max((one.megabytes for one in found), default=0):.0f}",
        f"{max((one.seconds for one in found), default=0):.1f}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(KINDS), len(sys.argv) > 1))
