"""Attack a release as others would, and say what they learn about the mask.

    pmp-ds audit --release runs/demo/release --ticket runs/demo/private/ticket
    pmp-ds audit --release downloaded/ --config recipe.yaml --text tokenized_data/demo

Prints a table and writes audit.json and audit.png. The exit code is 1 when something leaks that
could have been prevented. Attacks whose needs are not given are listed as not run. Without the
ticket only those answer that prove a leak by themselves. docs/SECURITY.md explains each.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pmp_ds.cli import PlainParser, parse
from pmp_ds.config import Config
from pmp_ds.errors import UserError, exit_code
from pmp_ds.run_dir import RunDir, make_private

EXIT_LEAK = 1


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = PlainParser("pmp-ds audit", __doc__)
    add = parser.add_argument
    add("--release", type=Path, required=True, metavar="FOLDER", help="what is attacked")
    add("--ticket", type=Path, metavar="TICKET", help="the true ticket, to measure against")
    add("--config", type=Path, metavar="FILE", help="the attacker's recipe, with its init.seed")
    add("--base", type=Path, metavar="FOLDER", help="another revision of the same run")
    add("--derivative", type=Path, metavar="FOLDER", help="a model tuned with the ticket")
    add("--text", type=Path, metavar="STORE", help="packed tokens, for gradients and discovery")
    add("--shadow", type=Path, metavar="RUN", help="the attacker's own PMP run, exported")
    add(
        "--seeds",
        default="0:4294967296",
        metavar="FIRST:END",
        help="range of the brute force; it stops after --seconds. Default: all 2^32",
    )
    add("--seconds", type=float, default=15.0, help="longest search or training of one attack")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where audit.json and audit.png go. Default: `audit` beside the ticket, else here",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    seeds = _seeds(args.seeds)
    if not args.seconds > 0:
        raise UserError(f"--seconds {args.seconds} must be positive")
    for name in ("release", "ticket", "base", "derivative", "text", "shadow"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            raise UserError(f"--{name} {path} does not exist")
    if args.ticket and not args.ticket.is_dir():
        args.ticket = args.ticket.parent  # one of the ticket's two files
    out = args.out or (args.ticket.resolve().parent / "audit" if args.ticket else Path("audit"))
    if out.resolve().is_relative_to(args.release.resolve()):
        raise UserError(
            f"--out {out} is inside --release {args.release}, which others may read: name another"
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

    ticket = load_ticket(args.ticket) if args.ticket else None
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
        seeds=seeds,
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


def _seeds(text: str) -> range:
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end) <= 1 << 32):
        raise UserError(
            f"--seeds {text} is not FIRST:END with 0 <= FIRST < END <= 4294967296: torch's CPU "
            "generator uses 32 bits"
        )
    return range(int(first), int(end))


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds audit` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
