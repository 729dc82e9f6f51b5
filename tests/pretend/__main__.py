"""Measure what an update costs, in every configuration of costs.py.

python -m tests.pretend                 # Markdown for docs/PERFORMANCE.md
python -m tests.pretend --waits         # and every wait: how often, what, where
python -m tests.pretend --python        # the table of costs.py
"""

import argparse
import sys
import tempfile
from collections import Counter

from tests.helpers.distributed import RankPool
from tests.pretend.costs import COSTS, Costs, table
from tests.pretend.device.build import Unavailable
from tests.pretend.job import Measured, measure, pool


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pretend", description=__doc__)
    parser.add_argument("--waits", action="store_true", help="list every wait with its place")
    parser.add_argument("--python", action="store_true", help="print the table of costs.py")
    options = parser.parse_args()
    found: dict[int, RankPool] = {}
    costs = {}
    try:
        for setup in COSTS:
            ranks = found.setdefault(setup.ranks, pool(setup.ranks))
            with tempfile.TemporaryDirectory() as folder:
                measured: list[Measured] = ranks.run(measure, setup, folder, timeout=300)
            costs[setup] = Costs.of(measured)
            if options.waits:
                print(f"\n{setup}\n{_waits(measured[0])}", flush=True)
    except Unavailable as error:
        sys.exit(str(error))
    finally:
        for ranks in found.values():
            ranks.close()
    if options.python:
        print(*(f"    {setup!r}: {one!r}," for setup, one in costs.items()), sep="\n")
    else:
        print(table(costs))


def _waits(measured: Measured) -> str:
    lines = []
    for phase in ("training", "discovery"):
        counted = Counter(
            (what, " < ".join(stack[:3])) for what, stack in getattr(measured, phase).waits
        )
        lines += [f"  {phase:9} {n:3} x {what}: {place}" for (what, place), n in counted.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
