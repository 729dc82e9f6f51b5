"""Sum up a finished run, or a whole study.

    pmp-ds report --run runs/demo
    pmp-ds report --study study/small
    pmp-ds report --study study/small --collect base=runs/base pmp=runs/pmp \\
        --audit runs/pmp/private/audit/audit.json

A run: data, ticket, losses, release and a generated sample, counted again from the files; nothing
that depends on which elements are in the ticket. A study: the folder's results.jsonl becomes
report/report.html, the same as report.md, tables (Markdown, LaTeX) and pictures: a verdict, six
numbers with 95% intervals, the paper's table and figures, and the controls that were not run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pmp_ds.cli import PlainParser
from pmp_ds.errors import UserError, exit_code
from pmp_ds.run_dir import RunDir
from pmp_ds.settings import expanded
from pmp_ds.state.run_record import load_config

PROMPT = "def "


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = PlainParser("pmp-ds report", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="FOLDER", help="runs/NAME")
    what.add_argument("--study", type=Path, metavar="FOLDER", help="has results.jsonl")
    add = parser.add_argument
    add("--prompt", default=PROMPT, metavar="TEXT", help="of --run: what the release continues")
    add(
        "--collect",
        nargs="+",
        default=[],
        metavar="ARM=RUN",
        help="of --study: add the pretraining of these runs to results.jsonl first",
    )
    add(
        "--audit",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="of --study: audit.json of the arms' releases. Default: FOLDER/audit/*/audit.json",
    )
    add("--out", type=Path, metavar="FOLDER", help="of --study. Default: FOLDER/report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.study is not None:
        _study(args)
        return
    run = RunDir(args.run)
    load_config(run)  # UserError at once when it is no run

    from pmp_ds.summary import summarize  # imports transformers: seconds

    print(summarize(run, args.prompt))


def _study(args: argparse.Namespace) -> None:
    runs = [_arm(text) for text in args.collect]
    if args.study.exists() and not args.study.is_dir():
        raise UserError(f"--study {args.study} is a file: name the folder of results.jsonl")
    from pmp_ds.study import report  # imports matplotlib: a second

    where = args.study / "results.jsonl"
    if runs:
        from pmp_ds.study.collect import collect  # imports torch: seconds

        collect(runs, where)
    out = args.out or args.study / "report"
    audits = args.audit or sorted(args.study.glob("audit/*/audit.json"))
    print("\n".join(report.write(where, audits, out)))
    print(f"written to {out}/: report.html, report.md, tables/, figures/")


def _arm(text: str) -> tuple[str, Path]:
    """`pmp=runs/demo`; of `runs/pmp` alone the arm is `pmp`."""
    arm, equals, path = text.partition("=")
    where = Path(expanded(path if equals else text, "--collect"))
    found = (arm if equals else where.name, where)
    if not found[0]:
        raise UserError(f"--collect {text}: write ARM=RUN as in pmp=runs/demo")
    return found


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds report` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
