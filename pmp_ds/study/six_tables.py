"""Tables of the six numbers, the audit and the controls."""

import math
from collections.abc import Iterator, Sequence

from pmp_ds.study.attacker import Tokens
from pmp_ds.study.controls import Control
from pmp_ds.study.glue_tables import head
from pmp_ds.study.headline import Contrast, Headline
from pmp_ds.study.runs import AVERAGE, FineTune, is_lm, ordered
from pmp_ds.study.statistics import Estimate
from pmp_ds.study.tables import Table
from pmp_ds.study.verdict import unit

NAMES = {
    "gap": ("(i)", "Unauthorized gap: best BASE - best PMP, both without the mask"),
    "authorized": ("(ii)", "Authorized - unauthorized, on PMP"),
    "secret": ("(iii)", "Value of the secret: true mask - random mask, on PMP"),
}
NOT_MEASURED = "not measured"


def table_six(six: Headline) -> Table:
    """One line per number; columns: what is averaged over is in the caption."""
    rows: list[tuple[str, ...]] = []
    for name, (roman, words) in NAMES.items():
        found: Contrast = getattr(six, name)
        rows += [(roman, words, *line) for line in _contrast(found)]
        if name == "gap" and six.matched is not None:
            arm, found = six.matched
            same = f"The same at matched base loss: best {arm} - best PMP"
            rows += [(roman, same, *line) for line in _contrast(found)]
    rows.append(
        (
            "(iv)",
            "Capability: BASE - PMP pretraining loss (the tax with its sign turned)",
            "-",
            *_numbers(six.capability, "nats per token"),
        )
    )
    words = "Attacker's tokens to BASE's fine-tuned quality: PMP beyond BASE"
    rows += [("(v)", words, task, *_tokens(tokens)) for task, tokens in six.tokens.items()]
    if not six.tokens:
        rows.append(("(v)", words, "-", NOT_MEASURED, "-", "-", "-"))
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
    glue = len([c for c in found.estimates if c != AVERAGE and not is_lm(c)])
    for column, estimate in found.main.items():
        on = f"GLUE, {glue} columns" if column == AVERAGE else column
        yield (on, *_numbers(estimate, unit(column)))
    if not found.main:
        yield ("-", NOT_MEASURED, "-", "-", "-")


def _numbers(estimate: Estimate | None, unit: str) -> tuple[str, str, str, str]:
    """Value, interval, effect size, seeds."""
    if estimate is None:
        return NOT_MEASURED, "-", "-", "-"
    digits = 4 if "nats" in unit else 2
    g = "-"
    if estimate.g is not None:
        g = f"{estimate.g:+.2f}"
        if estimate.g_low is not None and estimate.g_high is not None:
            g += f" [{estimate.g_low:+.2f}, {estimate.g_high:+.2f}]"
    return (
        f"{estimate.mean:+,.{digits}f} {unit}",
        interval(estimate, digits),
        g,
        f"{estimate.n} {'paired' if estimate.paired else 'each'}" if estimate.n > 1 else "1",
    )


def interval(estimate: Estimate, digits: int) -> str:
    if estimate.low is None or estimate.high is None:
        return "one seed"
    return f"[{estimate.low:+,.{digits}f}, {estimate.high:+,.{digits}f}]"


def _tokens(tokens: Tokens) -> tuple[str, str, str, str]:
    """Ratios as percent more."""
    reached = tokens.pairs - tokens.never
    text = f"reached in {reached} of {tokens.pairs} (task, seed) within {tokens.most:,.0f} tokens"
    if tokens.more is None:
        return text, "-", "-", "-"
    low, high = tokens.more.low, tokens.more.high
    between = "one seed" if low is None or high is None else f"[{_more(low)}, {_more(high)}]"
    return f"{_more(tokens.more.mean)} tokens; {text}", between, "-", f"{tokens.more.n}"


def _more(logarithm: float) -> str:
    return f"{100.0 * math.expm1(logarithm):+,.0f}%"


def _audits(six: Headline) -> Iterator[tuple[str, ...]]:
    if not six.audits:
        yield ("-", NOT_MEASURED, "-", "-", "-")
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
    """(i) to (iii) for each column."""
    contrasts = {roman: getattr(six, name) for name, (roman, _) in NAMES.items()}
    columns = ordered({c for found in contrasts.values() for c in found.estimates})
    rows = []
    for column in columns:
        digits = 4 if is_lm(column) else 2
        cells = []
        for found in contrasts.values():
            estimate = found.estimates.get(column)
            cells.append(
                "-"
                if estimate is None
                else f"{estimate.mean:+.{digits}f} {interval(estimate, digits)}"
            )
        rows.append((head(column), *cells))
    heads = (f"{roman} {words.split(':')[0]}" for roman, words in NAMES.values())
    return Table(
        "columns",
        "(i) to (iii) by column, percentage points of accuracy (losses: nats per token), with 95% "
        "intervals; each stands by itself, without correction for their number.",
        ("Column", *heads),
        rows,
    )


def table_chosen(six: Headline, runs: Sequence[FineTune]) -> Table:
    """Which settings won, of those that were varied."""
    tried: dict[tuple[str, str], set[object]] = {}
    for run in runs:
        for setting, value in run.choice:
            tried.setdefault((run.task, setting), set()).add(value)
    varied = {setting for (_, setting), values in tried.items() if len(values) > 1}
    rows = []
    for name, (roman, _) in NAMES.items():
        for task, sides in getattr(six, name).chosen.items():
            rows.append((roman, task, *(_choice(run, varied) for run in sides)))
    return Table(
        "chosen",
        "The settings that won, first and second side of each number.",
        ("Number", "Task", "First side", "Second side"),
        rows,
    )


def _choice(run: FineTune, varied: set[str]) -> str:
    settings = [f"{name} {_short(value)}" for name, value in run.choice if name in varied]
    return ", ".join([run.arm, run.method, *settings])


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def table_controls(found: Sequence[Control]) -> Table:
    return Table(
        "controls",
        "Controls that a reviewer asks for.",
        ("Control", "In these results"),
        [(control.name, control.found) for control in found],
    )


def table_audits(six: Headline) -> Table:
    """Every attack of every audit."""
    rows = [
        (
            path,
            row["attack"],
            _rate(row["auc"]),
            _rate(row["auc_outside_embeddings"]),
            _rate(row["iou"]),
            _rate(row["chance_iou"]),
            row["verdict"],
        )
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
