"""Say how runs are doing: phase, update, time left, last save, and whether a process is alive.

    pmp-ds status runs/demo
    pmp-ds status runs                       a table of the runs in a folder
    pmp-ds status runs/demo --json           a JSON object on a line for each run
    pmp-ds status runs/demo --max-age 120    for probes: exit code 3 without a sign of life

Reads only, from any host that sees the folder. A process elsewhere whose last sign is not fresh by
this host's clock is watched for a few seconds. Exit codes: 0; 1 if there is no such run, or none
that can be read; 3 with --max-age, if an unfinished run has shown no sign of life for that long.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmp_ds.cli import option, parse_options
from pmp_ds.errors import EXIT_MISTAKE, exit_code, require
from pmp_ds.operate.signs import WATCH_SECONDS
from pmp_ds.operate.status import found_in, states
from pmp_ds.operate.status_words import screen, table

EXIT_SILENT = 3


@dataclass(frozen=True, kw_only=True)
class Status:
    """Which runs, and how they are shown."""

    runs: tuple[Path, ...] = option("RUN", positional=True)
    """Runs, or folders that contain some."""

    json: bool = False
    """A JSON object on a line for each run; docs/OPERATIONS.md explains the fields."""

    max_age: float | None = option("SECONDS", None)
    """Exit with 3 if an unfinished run has shown no sign of life for so long."""

    def __post_init__(self) -> None:
        require(
            self.max_age is None or self.max_age >= WATCH_SECONDS,
            f"--max-age {self.max_age} must be at least {WATCH_SECONDS}: a process gives a sign "
            "of life every 3 s",
        )


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_options(Status, argv, prog="pmp-ds status", description=__doc__)
    found = states(found_in(args.runs))
    if args.json:
        print("\n".join(json.dumps(state.as_json()) for state in found))
    else:
        print(screen(found[0]) if len(found) == 1 else table(found))
    if args.max_age is not None and any(state.is_silent(args.max_age) for state in found):
        raise SystemExit(EXIT_SILENT)
    if all(state.phase == "unknown" for state in found):
        raise SystemExit(EXIT_MISTAKE)


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds status` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
