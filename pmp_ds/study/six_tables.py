"""Tables of the six numbers, the audit and the controls."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from pmp_ds.study.attacker import Tokens
from pmp_ds.study.controls import Control
from pmp_ds.study.glue_tables import head
from pmp_ds.study.headline import Contrast, Headline
from pmp_ds.study.runs import AVERAGE, LM, FineTune, digits, ordered
from pmp_ds.study.statistics import Estimate
from pmp_ds.study.tables import Table
from pmp_ds.study.verdict import between, mean

NOT_MEASURED = "not measured"


def table_six(six: Headline) -> Table:
    """Return one line per number and column."""
    rows: list[tuple[str, ...]] = []
    for roman, words, found in six.contrasts:
        rows += [(roman, words, *line) for line in _contrast(found)]
        if found is six.gap and six.matched is not None:
            arm, matched = six.matched
            same = f"The same at matched base loss: best {arm} - best PMP"
            rows += [(roman, same, *line) for line in _contrast(matched)]
    words = "Capability: BASE - PMP pretraining loss (the tax with its sign turned)"
    rows.append(("(iv)", words, "-", *_numbers(six.capability, LM)))
    words = "Attacker's tokens to BASE's fine-tuned quality: PMP beyond BASE"
    rows += [("(v)", words, task, *_tokens(tokens)) for task, tokens in six.tokens.items()]
    if not six.tokens:
        rows.append(("(v)", words, "-", *_numbers(None, LM)))
    rows += [("(vi)", "Audit of the release", *line) for line in _audits(six)]
    return Table(
        "headline",
        "The six numbers. Positive is what the owner of the mask wants. 95% intervals by Student's "
        "t, over pairs with the same seed where both sides have it, else Welch's; Hedges' g with "
        "its interval from the noncentral t. N: seeds, pairs, or models where (i) has several.",
        ("", "Number", "On", "Value", "95% interval", "Hedges' g", "N"),
        rows,
    )


def _contrast(found: Contrast) -> Iterator[tuple[str, ...]]:
    for column, estimate in found.main.items():
        on = f"GLUE, {len(found.glue)} columns" if column == AVERAGE else column
        yield (on, *_numbers(estimate, column))
    if not found.main:
        yield ("-", *_numbers(None, LM))


def _numbers(estimate: Estimate | None, column: str) -> tuple[str, str, str, str]:
    """Value, interval, effect size, seeds."""
    if estimate is None:
        return NOT_MEASURED, "-", "-", "-"
    g = "-" if estimate.g is None else f"{estimate.g:+.2f}"
    if estimate.g_interval is not None:
        g += " [{:+.2f}, {:+.2f}]".format(*estimate.g_interval)
    n = f"{estimate.n} {'paired' if estimate.paired else 'each'}" if estimate.n > 1 else "1"
    return mean(estimate, column), between(estimate, column), g, n


def _tokens(tokens: Tokens) -> tuple[str, str, str, str]:
    """Ratios as percent more."""
    reached = tokens.pairs - tokens.never
    text = f"reached in {reached} of {tokens.pairs} (task, seed) within {tokens.most:,.0f} tokens"
    if tokens.more is None:
        return text, "-", "-", "-"
    ends = map(_more, tokens.more.interval or ())
    interval = f"[{', '.join(ends)}]" if tokens.more.interval else "one seed"
    return f"{_more(tokens.more.mean)} tokens; {text}", interval, "-", f"{tokens.more.n}"


def _more(logarithm: float) -> str:
    return f"{100.0 * math.expm1(logarithm):+,.0f}%"


def _audits(six: Headline) -> Iterator[tuple[str, ...]]:
    if not six.audits:
        yield ("-", *_numbers(None, LM))
    for path, audit in six.audits.items():
        rows = [row for row in audit["attacks"] if row["iou"] is not None]
        worst = max(rows, key=lambda row: row["iou"] - row["chance_iou"], default=None)
        text = f"{len(audit['leaks'])} preventable leaks"
        if worst:
            text += (
                f"; strongest: {worst['attack']}, IoU {worst['iou']:.3f} "
                f"(chance {worst['chance_iou']:.3f})"
            )
        yield (path, text, "-", "-", "-")


def table_columns(six: Headline) -> Table:
    """Return (i) to (iii) for each column."""
    columns = ordered({c for found in six.by_column.values() for c in found})
    rows = [
        (head(column), *(_short(found.get(column), column) for found in six.by_column.values()))
        for column in columns
    ]
    return Table(
        "columns",
        "(i) to (iii) by column, percentage points of accuracy (losses: nats per token), with 95% "
        "intervals; each stands by itself, without correction for their number.",
        ("Column", *six.by_column),
        rows,
    )


def _short(estimate: Estimate | None, column: str) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.mean:+,.{digits(column)}f} {between(estimate, column)}"


def table_chosen(six: Headline, runs: Sequence[FineTune]) -> Table:
    """Return which settings won, of those that were varied."""
    tried: dict[tuple[str, str], set[object]] = defaultdict(set)
    for run in runs:
        for setting, value in run.choice:
            tried[run.task, setting].add(value)
    varied = {setting for (_, setting), values in tried.items() if len(values) > 1}
    return Table(
        "chosen",
        "The settings that won, first and second side of each number.",
        ("Number", "Task", "First side", "Second side"),
        [
            (roman, task, *(_choice(run, varied) for run in sides))
            for roman, _, found in six.contrasts
            for task, sides in found.chosen.items()
        ],
    )


def _choice(run: FineTune, varied: set[str]) -> str:
    settings = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in run.choice
        if name in varied
    ]
    return ", ".join([run.arm, run.method, *settings])


def table_controls(found: Sequence[Control]) -> Table:
    return Table(
        "controls",
        "Controls that a reviewer asks for.",
        ("Control", "In these results"),
        [(control.name, control.found) for control in found],
    )


def table_audits(six: Headline) -> Table:
    """Return every attack of every audit."""
    rates = "auc", "auc_outside_embeddings", "iou", "chance_iou"
    rows = [
        (path, row["attack"], *(_rate(row[name]) for name in rates), row["verdict"])
        for path, audit in six.audits.items()
        for row in audit["attacks"]
    ]
    return Table(
        "audit",
        "What each attack recovers of the mask; AUC 0.5 is chance.",
        ("Audit", "Attack", "AUC", "AUC outside embeddings", "IoU", "IoU by chance", "Verdict"),
        rows,
    )


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
