"""The paper's Figure 4: score against density, learning rate and epochs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from pmp_ds.results import Result
from pmp_ds.study.figures import COLOURS, INTERVALS, MARKERS, Picture, error, one_legend, save
from pmp_ds.study.glue_tables import heads, levels
from pmp_ds.study.runs import (
    AVERAGE,
    BASE,
    PMP,
    FineTune,
    best,
    is_lm,
    ordered,
    pick,
    samples,
    tasks,
    with_average,
)
from pmp_ds.study.statistics import Estimate

SWEPT = "mask density", "learning rate", "epochs"
LINES = (BASE, PMP, "fine-tuned", "untrained head")


@dataclass(frozen=True)
class Sweep:
    """One panel of Figure 4."""

    curves: Mapping[str, Mapping[float, Estimate]] = field(default_factory=dict)
    """Label -> place -> score."""
    columns: frozenset[str] = frozenset()
    """What is averaged: those that all places have."""


def draw(folder: Path, results: Sequence[Result], runs: Sequence[FineTune]) -> Picture | None:
    """A row for GLUE and for each loss; panels density, learning rate, epochs."""
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
    return save(
        figure,
        folder,
        Picture(
            "figure4",
            "Score against mask density, learning rate and epochs of full fine-tuning.",
            "Figure 4. Full fine-tuning against density, learning rate and epochs; at each place "
            f"the best of the other settings. Density 1 is BASE. {INTERVALS}",
        ),
    )


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
        [p[0] for p in points],
        [p[1] for p in points],
        yerr=[[p[2] for p in points], [p[3] for p in points]],
        marker=MARKERS[i],
        color=COLOURS[i],
        markersize=4.5,
        capsize=2,
        linewidth=1.2,
        label=label,
    )


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
    """Arms that differ from PMP in density alone (or in the pretraining seed), and BASE at 1."""
    pretrained = [result for result in results if result.kind == "pretrain"]
    of_pmp = [_but_density(result) for result in pretrained if result.arm == PMP]
    return {
        r.arm: r.settings["density"]
        for r in pretrained
        if r.arm == BASE or _but_density(r) in of_pmp
    }


def _but_density(result: Result) -> dict[str, Any]:
    return {k: v for k, v in result.settings.items() if k not in {"density", "seed"}}


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
