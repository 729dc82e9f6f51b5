"""Attack a release as others would, and say what they learn about the mask.

    pmp-ds audit --release runs/demo/release --ticket runs/demo/private/ticket
    pmp-ds audit --release downloaded/ --config recipe.yaml --text tokenized_data/demo

Prints a table and writes audit.json and audit.png. The exit code is 1 when something leaks that
could have been prevented. Attacks whose needs are not given are listed as not run. Without the
ticket only those answer that prove a leak by themselves. docs/SECURITY.md explains each.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmp_ds.cli import option, parse, parse_options
from pmp_ds.config import Config
from pmp_ds.errors import exit_code, require
from pmp_ds.run_dir import RunDir, make_private

EXIT_LEAK = 1


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What is attacked, and what the attacker has."""

    release: Path = option("FOLDER")
    """The release that is attacked."""

    ticket: Path | None = option("TICKET", None)
    """The true ticket, to measure against: its folder, or one of its two files."""

    config: Path | None = option("FILE", None)
    """The attacker's recipe, with its init.seed."""

    base: Path | None = option("FOLDER", None)
    """Weights of the same run that the attacker knows: those that it started from (init.weights),
    or another revision."""

    derivative: Path | None = option("FOLDER", None)
    """A model tuned with the ticket."""

    text: Path | None = option("STORE", None)
    """Packed tokens, for gradients and discovery."""

    shadow: Path | None = option("RUN", None)
    """The attacker's own PMP run, exported."""

    seeds: str = option("FIRST:END", "0:4294967296")
    """Range of the brute force, all 2^32 by default; it stops after --seconds."""

    seconds: float = 15.0
    """Longest search or training of one attack."""

    out: Path | None = option("FOLDER", None)
    """Where audit.json and audit.png go. Default: `audit` beside the ticket, else here."""

    def __post_init__(self) -> None:
        require(self.seconds > 0, f"--seconds {self.seconds} must be positive")
        first, _, end = self.seeds.partition(":")
        require(
            first.isdecimal() and end.isdecimal() and int(first) < int(end) <= 1 << 32,
            f"--seeds {self.seeds} is not FIRST:END with 0 <= FIRST < END <= 4294967296: torch's "
            "CPU generator uses 32 bits",
        )

    @property
    def ticket_folder(self) -> Path | None:
        """Return the ticket's folder, also if one of its files is named."""
        return self.ticket.parent if self.ticket and self.ticket.is_file() else self.ticket

    @property
    def out_folder(self) -> Path:
        ticket = self.ticket_folder
        return self.out or (ticket.resolve().parent / "audit" if ticket else Path("audit"))


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_options(Audit, argv, prog="pmp-ds audit", description=__doc__)
    for name in ("release", "ticket", "base", "derivative", "text", "shadow"):
        path = getattr(args, name)
        require(path is None or path.exists(), f"--{name} {path} does not exist")
    out = args.out_folder
    require(
        not out.resolve().is_relative_to(args.release.resolve()),
        f"--out {out} is inside --release {args.release}, which others may read: name another",
    )
    config = parse(Config, ["--config", str(args.config)])[0] if args.config else None
    # Slow imports come after the quick checks.
    from pmp_ds.audit.attack import run_attacks
    from pmp_ds.audit.case import Case, Shadow, Weights
    from pmp_ds.audit.report import ATTACKS, table, write
    from pmp_ds.data.arrow_store import Store
    from pmp_ds.progress import Progress
    from pmp_ds.ticket.fit import fitted
    from pmp_ds.ticket.mask import ParamMask
    from pmp_ds.ticket.ticket import Ticket, load_ticket

    def mask_on(weights: Weights, ticket: Ticket) -> ParamMask:
        return fitted(ticket.mask, weights.shapes, weights.folder)

    ticket = load_ticket(args.ticket_folder) if args.ticket_folder else None
    release, shadow = Weights.open(args.release), None
    if args.shadow:
        run = RunDir(args.shadow)
        own = Weights.open(run.release)
        shadow = Shadow(own, mask_on(own, load_ticket(run.ticket)))
    case = Case(
        release=release,
        mask=mask_on(release, ticket) if ticket else None,
        config=config,
        base=Weights.open(args.base) if args.base else None,
        derivative=Weights.open(args.derivative) if args.derivative else None,
        text=Store.open(args.text) if args.text else None,
        shadow=shadow,
        seeds=range(*map(int, args.seeds.split(":"))),
        seconds=args.seconds,
    )
    results = []
    with Progress("audit", "attack", len(ATTACKS)) as bar:
        for result in run_attacks(ATTACKS, case):
            results.append(result)
            bar.update(1)
    print(table(results))
    out.parent.mkdir(parents=True, exist_ok=True)
    make_private(out)
    write(out, case, results)
    leaks = [result.attack for result in results if result.verdict == "leak"]
    print(f"written to {out}/")
    if leaks:
        print(f"leak that can be prevented: {', '.join(leaks)}", file=sys.stderr)
        raise SystemExit(EXIT_LEAK)


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds audit` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
