"""All of a study's results to a folder: report.md, report.html, tables/, figures/."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmp_ds import formats
from pmp_ds import results as results_file
from pmp_ds.errors import UserError, require
from pmp_ds.fields import fit
from pmp_ds.results import Result
from pmp_ds.run_dir import read_json, write_text
from pmp_ds.study import glue_figures, measured, model_figures
from pmp_ds.study.controls import Control, controls, edges
from pmp_ds.study.figures import Picture
from pmp_ds.study.glue_tables import table_canonical, table_methods, table_one, table_other
from pmp_ds.study.headline import MATCHED, Headline, headline
from pmp_ds.study.page import Section, markdown, page
from pmp_ds.study.runs import FineTune, fine_tunes
from pmp_ds.study.six_tables import (
    table_audits,
    table_chosen,
    table_columns,
    table_controls,
    table_six,
)
from pmp_ds.study.tables import Table
from pmp_ds.study.verdict import verdict

TITLE = "Private Mask Pre-Training: results of the study"
NOT_RUN = "Not run."

# What numbers of well-formed lines raise that contradict each other: a metric that is nowhere,
# lists of two lengths, a plot from minus to plus infinity.
_DO_NOT_FIT = (KeyError, IndexError, ValueError, TypeError, ArithmeticError, RuntimeError)

Part = str | Table | Picture


def write(results_path: Path, audit_paths: Sequence[Path], out: Path) -> list[str]:
    """Write the report; returns the verdict. Raises UserError for missing or damaged input."""
    require(
        results_path.exists(),
        f"{results_path} is missing: pmp-ds finetune and `evaluate` write it",
    )
    results = measured.check(results_path, results_file.read(results_path))
    require(bool(results), f"{results_path} is empty: measure something first")
    audits = {str(path): read_audit(path) for path in audit_paths}
    for folder in (out / "tables", figures := out / "figures"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        runs = fine_tunes(results)
        six = headline(results, runs, audits)
        drawn = glue_figures.draw(figures, results, runs, six)
        made = sections(results, runs, six, drawn | model_figures.draw(figures, results))
    except _DO_NOT_FIT as error:
        raise UserError(
            f"{results_path}: its measurements do not fit together "
            f"({type(error).__name__}: {error!s:.80}); delete the lines of other programs"
        ) from error
    for table in (part for section in made for part in section.parts if isinstance(part, Table)):
        write_text(out / "tables" / f"{table.name}.md", table.markdown())
        write_text(out / "tables" / f"{table.name}.tex", table.latex())
    write_text(out / "report.md", markdown(TITLE, made))
    write_text(out / "report.html", page(TITLE, made, figures))
    return verdict(six)


def read_audit(path: Path) -> dict[str, Any]:
    """Return an audit.json of pmp-ds audit."""
    require(path.exists(), f"{path} is missing: pmp-ds audit writes it")
    audit = read_json(path)
    require("attacks" in audit and "leaks" in audit, f"{path} is no audit.json")
    version = fit(int, audit.get("format_version"), f"{path}: format_version")
    formats.require("audit", path, version, way_out="write the report with that version")
    found: dict[str, Any] = fit(measured.Audit, audit, path)
    return found


def sections(
    results: Sequence[Result],
    runs: Sequence[FineTune],
    six: Headline,
    pictures: Mapping[str, Picture],
) -> list[Section]:
    """Return the report in order; a part that was not measured says so."""
    checks = controls(results, runs)

    def picture(name: str, absent: str = NOT_RUN) -> Part:
        return pictures.get(name, absent)

    parts: dict[str, Sequence[Part]] = {
        "Verdict": [*verdict(six), *_reservations(runs, checks)],
        "The six numbers": [table_six(six), table_columns(six), picture("gaps")],
        "Table 1: base, LoRA and full fine-tuning": _or_not_run(table_one(results, runs)),
        "Figure 3: authorized against unauthorized": [
            picture("figure3"),
            *_if_any(table_methods(runs)),
        ],
        "Figure 2: early-bird ticket against random mask": [
            picture("figure2a", "Before fine-tuning: not run."),
            picture("figure2b", "After fine-tuning: not run."),
        ],
        "Figure 4: density, learning rate, epochs": [picture("figure4")],
        "Figure 5: loss landscape": [picture("figure5")],
        "Figure 6: gradients": [picture("figure6")],
        "Stability of the ticket": [picture("iou")],
        "Pretraining": [picture("pretraining")],
        "The models without fine-tuning": _or_not_run(table_other(results)),
        "Audit": _or_not_run(table_audits(six)),
        "Canonical metrics": _or_not_run(table_canonical(runs)),
        "Controls": [table_controls(checks), *_edges(runs)],
        "How the numbers were made": [*METHOD, *_if_any(table_chosen(six, runs))],
        "Measurements": [_provenance(results)],
    }
    return [Section(title, own) for title, own in parts.items()]


def _if_any(table: Table) -> list[Part]:
    return [table] if table.rows else []


def _or_not_run(table: Table) -> list[Part]:
    return _if_any(table) or [NOT_RUN]


def _reservations(runs: Sequence[FineTune], checks: Sequence[Control]) -> Iterator[str]:
    arms = dict.fromkeys(run.arm for run in runs if not run.scratch)
    models = {(run.arm, run.model) for run in runs if not run.scratch}
    single = [arm for arm in arms if sum(own == arm for own, _ in models) == 1]
    if single:
        yield (
            f"One model each stands for {', '.join(single)}: the intervals cover the chance of "
            "fine-tuning, not that of pretraining."
        )
    absent = [control.name for control in checks if not control.run]
    if absent:
        yield f"Controls not run, or not in full: {'; '.join(absent)}."


def _edges(runs: Sequence[FineTune]) -> Iterator[str]:
    found = edges(runs)
    if found:
        yield (
            "Sweeps whose best learning rate is the first or last one tried, so that a better one "
            f"may lie beyond: {'; '.join(found)}."
        )


def _provenance(results: Sequence[Result]) -> str:
    kinds = sorted(Counter(result.kind for result in results).items())
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
    dates = sorted(result.date for result in results)
    return (
        f"{len(results)} measurements ({counts}), from {dates[0]} to {dates[-1]}, "
        f"{sum(result.seconds for result in results) / 3600:.2f} hours of wall time in all, on "
        f"{'; '.join(sorted({result.hardware for result in results}))}, with pmp-ds "
        f"{', '.join(sorted({result.version for result in results}))}."
    )


METHOD = [
    text.replace("\n", " ")
    for text in f"""\
Choice of settings: an attacker tries every setting of the sweep and keeps the best. Both sides of a
comparison choose among the same settings, those that both completed with all seeds, by the mean
validation score over the seeds, once per task. The score is that of the validation split on which
it was chosen, for both sides alike.

Intervals: 95%. Where both sides have the same seeds, Student's t over the differences seed by seed;
otherwise Welch's t. Where arms have several models (pretraining seeds), (i) compares models, each
the mean of its fine-tuning seeds; (ii) and (iii) compare two ways to fine-tune the same models, in
pairs of model and seed, and hold for these models. Intervals of single scores take all runs as
equals. Effect sizes are Hedges' g: the mean difference over the standard deviation of the
differences (paired) or of the groups (unpaired), corrected for few seeds, with the interval of the
noncentral t distribution.

Averages: over GLUE's columns with accuracy-style scores, as the paper does, for the seeds that have
them all. Language modelling stays apart, in nats per token.

(v): for each task and seed the target is where BASE's best fine-tune of that seed ends. Both arms
may use whichever setting reaches it first. The ratio is over the seeds that got there, so it is too
low where some never did.

Matched base: pretraining losses at most {MATCHED:g} nats per token apart.""".split("\n\n")
]
"""Paragraphs."""
