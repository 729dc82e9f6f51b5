"""Pictures of fine-tuning scores: the gaps, Figure 2, Figure 3 and Figure 4 of the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from pmp_ds.results import Result
from pmp_ds.study.figures import (
    COLOURS,
    LABELS,
    MARKERS,
    Picture,
    by_column,
    error,
    one_legend,
    save,
)
from pmp_ds.study.glue_tables import (
    HEADS,
    METHODS,
    Levels,
    fine_tuned,
    heads,
    levels,
    majority,
)
from pmp_ds.study.headline import BASE, PMP, RANDOM, Headline
from pmp_ds.study.runs import (
    AVERAGE,
    UNAUTHORIZED,
    FineTune,
    best,
    is_lm,
    ordered,
    pick,
    samples,
    tasks,
    with_average,
)
from pmp_ds.study.six_tables import NAMES
from pmp_ds.study.statistics import Estimate

SWEPT = "mask density", "learning rate", "epochs"
LINES = (BASE, PMP, "fine-tuned", "untrained head")
INTERVALS = "Bars are 95% intervals over seeds; a point without one is a single seed."


def draw(
    folder: Path, results: Sequence[Result], runs: Sequence[FineTune], six: Headline
) -> dict[str, Picture]:
    """Every picture that the results allow, by name."""
    made = (
        _gaps(folder, six), _authorized(folder, results, runs), _before(folder, results),
        _after(folder, results, runs), _sweeps(folder, results, runs),
    )  # fmt: skip
    return {picture.name: picture for picture in made if picture is not None}


def _gaps(folder: Path, six: Headline) -> Picture | None:
    """(i) to (iii) for each column, against 0."""
    contrasts = {
        f"{roman} {words.split(':')[0]}": getattr(six, name).estimates
        for name, (roman, words) in NAMES.items()
    }
    contrasts = {name: found for name, found in contrasts.items() if found}
    columns = ordered({c for found in contrasts.values() for c in found})
    panels = [[c for c in columns if is_lm(c) == lm] for lm in (False, True)]
    panels = [part for part in panels if part]
    if not panels:
        return None
    heights = [0.5 + 0.42 * len(part) for part in panels]
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(7.6, sum(heights) + 1.6), layout="constrained",
        gridspec_kw={"height_ratios": heights}, squeeze=False,
    )  # fmt: skip
    for axes, part in zip(grid[:, 0], panels, strict=True):
        _forest(axes, contrasts, part)
        axes.set_xlabel(
            "difference (nats per token)" if is_lm(part[0])
            else "difference (percentage points of accuracy)"
        )  # fmt: skip
    one_legend(figure, grid[:, 0], columns=1)
    figure.suptitle("What the mask changes: right of 0 is what its owner wants", fontsize=11)
    return save(figure, folder, Picture(
        "gaps", "Differences (i) to (iii) with intervals for each column, beside a line at 0.",
        f"The gaps by column. {INTERVALS}",
    ))  # fmt: skip


def _forest(
    axes: Axes, contrasts: Mapping[str, Mapping[str, Estimate]], columns: Sequence[str]
) -> None:
    for i, (name, found) in enumerate(contrasts.items()):
        shown = [c for c in columns if c in found]
        values = [error(found[c], 1.0) for c in shown]
        axes.errorbar(
            [v[0] for v in values], [columns.index(c) + (i - 1) * 0.22 for c in shown],
            xerr=list(zip(*(v[1:] for v in values), strict=True)) or None,
            fmt=MARKERS[i], color=COLOURS[i], markersize=4.5, capsize=2, elinewidth=1.2, label=name,
        )  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(columns)), [LABELS.get(c, c) for c in columns])
    axes.set_ylim(len(columns) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.3)


def _authorized(
    folder: Path, results: Sequence[Result], runs: Sequence[FineTune]
) -> Picture | None:
    series = {
        words: fine_tuned(runs, PMP, (method,)) for method, words in METHODS.items()
        if pick(runs, arm=PMP, methods=(method,))
    }  # fmt: skip
    figure = by_column(series, "Figure 3. Fine-tuning the PMP model", majority(results))
    if figure is None:
        return None
    return save(figure, folder, Picture(
        "figure3", "Scores of the PMP model by fine-tuning method and column.",
        f"Figure 3. Authorized against unauthorized fine-tuning of the PMP model. {INTERVALS}",
    ))  # fmt: skip


EARLY_BIRD = {BASE: "no mask", PMP: "early-bird ticket", RANDOM: "random mask"}


def _before(folder: Path, results: Sequence[Result]) -> Picture | None:
    series = {
        f"{words}, {head.lower()}": found
        for kind, head in HEADS.items() for arm, words in EARLY_BIRD.items()
        if (found := heads(results, arm, kind))
    }  # fmt: skip
    title = "Figure 2a. Before fine-tuning: early-bird ticket or random mask"
    return _earlybird(folder, "figure2a", title, series, results)


def _after(folder: Path, results: Sequence[Result], runs: Sequence[FineTune]) -> Picture | None:
    series = {
        words: found for arm, words in EARLY_BIRD.items()
        if (found := fine_tuned(runs, arm, UNAUTHORIZED))
    }  # fmt: skip
    title = "Figure 2b. Best unauthorized fine-tuning: early-bird ticket or random mask"
    return _earlybird(folder, "figure2b", title, series, results)


def _earlybird(
    folder: Path, name: str, title: str, series: Mapping[str, Levels], results: Sequence[Result]
) -> Picture | None:
    if not any(words.startswith(EARLY_BIRD[RANDOM]) for words in series):
        return None
    figure = by_column(series, title, majority(results))
    if figure is None:
        return None
    return save(figure, folder, Picture(
        name, f"{title}: scores of the three models by column.", f"{title}. {INTERVALS}"
    ))  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """One panel of Figure 4."""

    curves: Mapping[str, Mapping[float, Estimate]] = field(default_factory=dict)
    """Label -> place -> score."""
    columns: frozenset[str] = frozenset()
    """What is averaged: those that all places have."""


def _sweeps(folder: Path, results: Sequence[Result], runs: Sequence[FineTune]) -> Picture | None:
    """Figure 4: a row for GLUE and for each loss; panels density, learning rate, epochs."""
    groups = [[run for run in runs if not is_lm(run.task)]]
    groups += [[r for r in runs if r.task == task] for task in tasks(runs) if is_lm(task)]
    groups = [group for group in groups if group]
    panels = [
        (group, [_densities(results, group), *(_by_setting(group, n) for n in ("lr", "epochs"))])
        for group in groups
    ]
    if not any(sweep.curves for _, row in panels for sweep in row):
        return None
    figure, grid = plt.subplots(
        len(panels), 3, figsize=(11, 3.4 * len(panels) + 0.7), layout="constrained", squeeze=False
    )
    for axes_row, (group, row) in zip(grid, panels, strict=True):
        _sweep_row(axes_row, group, row)
    one_legend(figure, grid.flat, columns=4)
    figure.suptitle("Figure 4. Density, learning rate and epochs", fontsize=11)
    return save(figure, folder, Picture(
        "figure4", "Score against mask density, learning rate and epochs of full fine-tuning.",
        "Figure 4. Full fine-tuning against density, learning rate and epochs; at each place the "
        f"best of the other settings. Density 1 is BASE. {INTERVALS}",
    ))  # fmt: skip


def _sweep_row(panels: Sequence[Axes], group: Sequence[FineTune], row: Sequence[Sweep]) -> None:
    lm = is_lm(group[0].task)
    for axes, name, sweep in zip(panels, SWEPT, row, strict=True):
        axes.set_xlabel(name)
        if not sweep.curves:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color="#555555")
            continue
        for label, curve in sweep.curves.items():
            _line(axes, label, curve, 1.0 if lm else 100.0)
        if name == "learning rate":
            axes.set_xscale("log")
        names = ordered(sweep.columns)
        of = names[0] if len(names) == 1 else f"average of {len(names)} columns"
        axes.set_title(of, fontsize=9)
        axes.set_ylabel("loss (nats per token), lower is better" if lm else "accuracy (%)")
        axes.grid(linewidth=0.3)


def _line(axes: Axes, label: str, curve: Mapping[float, Estimate], factor: float) -> None:
    i = LINES.index(label)
    points = [(x, *error(curve[x], factor)) for x in sorted(curve)]
    axes.errorbar(
        [p[0] for p in points], [p[1] for p in points],
        yerr=[[p[2] for p in points], [p[3] for p in points]], marker=MARKERS[i],
        color=COLOURS[i], markersize=4.5, capsize=2, linewidth=1.2, label=label,
    )  # fmt: skip


def _main_column(found: Mapping[str, Estimate]) -> Estimate | None:
    """The average over GLUE, or the only column."""
    if AVERAGE in found:
        return found[AVERAGE]
    return next(iter(found.values())) if len(found) == 1 else None


def _summary(runs: Sequence[FineTune], columns: frozenset[str]) -> Estimate | None:
    """Best cell of each task; None unless all ``columns`` are there."""
    found = {}
    for task in tasks(runs):
        found.update(samples(best(run for run in runs if run.task == task)))
    return _main_column(levels(with_average(found))) if found.keys() == columns else None


def _columns(runs: Sequence[FineTune]) -> frozenset[str]:
    return frozenset(column for run in runs for column in run.metrics)


def _by_setting(group: Sequence[FineTune], name: str) -> Sweep:
    """BASE and PMP against a setting, wherever it has at least two values."""
    at: dict[tuple[str, float], list[FineTune]] = {}
    for arm in (BASE, PMP):
        for run in pick(group, arm=arm, methods=("full",)):
            if run.setting(name) is not None:
                at.setdefault((arm, float(run.setting(name))), []).append(run)
    return _sweep(at)


def _density_arms(results: Sequence[Result]) -> dict[str, float]:
    """Arms that differ from PMP in density alone, and BASE at 1."""
    pretrained = [result for result in results if result.kind == "pretrain"]
    scores = {r.settings["score"] for r in pretrained if r.arm == PMP}
    return {
        r.arm: r.settings["density"] for r in pretrained
        if r.arm == BASE or (r.settings["source"] == "earlybird" and r.settings["score"] in scores)
    }  # fmt: skip


def _densities(results: Sequence[Result], group: Sequence[FineTune]) -> Sweep:
    arms = _density_arms(results)
    at = {("fine-tuned", arms[arm]): pick(group, arm=arm, methods=("full",)) for arm in arms}
    sweep = _sweep({place: own for place, own in at.items() if own})
    untrained = {}
    for arm, density in arms.items():
        found = heads(results, arm, "untrained-head")
        if sweep.curves and found.keys() - {AVERAGE} == sweep.columns:
            untrained[density] = found.get(AVERAGE) or next(iter(found.values()))
    curves = {**sweep.curves, **({"untrained head": untrained} if untrained else {})}
    return Sweep(curves, sweep.columns)


def _sweep(at: Mapping[tuple[str, float], Sequence[FineTune]]) -> Sweep:
    """(label, place) -> its runs, to curves over the columns that every place has."""
    if len({place for _, place in at}) < 2:
        return Sweep()
    shared = frozenset.intersection(*(_columns(own) for own in at.values()))
    curves: dict[str, dict[float, Estimate]] = {}
    for (label, place), own in at.items():
        kept = [run for run in own if set(run.metrics) <= shared]
        if (value := _summary(kept, shared)) is not None:
            curves.setdefault(label, {})[place] = value
    return Sweep(curves, shared)
