"""Sum up a finished run, or a whole study.

    pmp-ds report --run runs/demo
    pmp-ds report --study study/small
    pmp-ds report --study study/small --collect base=runs/base pmp=runs/pmp \\
        --audit runs/pmp/private/audit/audit.json

A run: data, ticket, losses, release and a generated sample, counted again from the files; nothing
that depends on which elements are in the ticket; and a page with the curves, the throughput and the
starts and faults of the run, report.html in its folder. A study: the folder's results.jsonl becomes
report/report.html, the same as report.md, tables (Markdown, LaTeX) and pictures: a verdict, six
numbers with 95% intervals, the paper's table and figures, and the controls that were not run.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmp_ds.cli import option, parse_options
from pmp_ds.errors import UserError, exit_code, require
from pmp_ds.run_dir import RunDir
from pmp_ds.settings import expanded
from pmp_ds.state.run_record import load_config


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run or a study, and what to say about it."""

    run: Path | None = option("FOLDER", None)
    """A run's folder, runs/NAME."""

    study: Path | None = option("FOLDER", None)
    """A study's folder, with its results.jsonl."""

    prompt: str = "def "
    """Of --run: what the release continues."""

    collect: tuple[str, ...] = option("ARM=RUN", ())
    """Of --study: add the pretraining of these runs to results.jsonl first."""

    audit: tuple[Path, ...] = option("FILE", ())
    """Of --study: audit.json of the arms' releases. Default: FOLDER/audit/*/audit.json."""

    out: Path | None = option("FOLDER", None)
    """Of --study: where the report goes. Default: FOLDER/report."""

    def __post_init__(self) -> None:
        require(
            (self.run is None) != (self.study is None), "name one of --run and --study; see --help"
        )


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_options(Report, argv, prog="pmp-ds report", description=__doc__)
    if args.study is not None:
        _study(args, args.study)
    if args.run is not None:
        run = RunDir(args.run)
        config = load_config(run)  # UserError at once when it is no run
        from pmp_ds.study import run_page
        from pmp_ds.summary import in_lines, rows_of  # imports transformers: seconds

        rows = rows_of(run, args.prompt)
        print(in_lines(rows))
        print(f"  {'page':<12}{run_page.write(run, config.run.name, rows)}")


def _study(args: Report, study: Path) -> None:
    runs = [_arm(text) for text in args.collect]
    if study.exists() and not study.is_dir():
        raise UserError(f"--study {study} is a file: name the folder of results.jsonl")
    from pmp_ds.study import report  # imports matplotlib: a second

    where = study / "results.jsonl"
    if runs:
        from pmp_ds.study.collect import collect  # imports torch: seconds

        collect(runs, where)
    out = args.out or study / "report"
    audits = args.audit or sorted(study.glob("audit/*/audit.json"))
    print("\n".join(report.write(where, audits, out)))
    print(f"written to {out}/: report.html, report.md, tables/, figures/")


def _arm(text: str) -> tuple[str, Path]:
    """Parse `pmp=runs/demo`; the arm of `runs/pmp` alone is `pmp`."""
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
