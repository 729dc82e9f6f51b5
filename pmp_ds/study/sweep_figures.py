"""The paper's Figure 4: score against density, learning rate and epochs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from pmp_ds.finetune.method import FULL
from pmp_ds.results import Result
from pmp_ds.study.figures import INTERVALS, Picture, intervals, not_run, one_legend, panels, save
from pmp_ds.study.glue_tables import heads, tuned
from pmp_ds.study.runs import AVERAGE, BASE, PMP, FineTune, by_task, is_lm, ordered, pick
from pmp_ds.study.statistics import Estimate

SWEPT = "mask density", "learning rate", "epochs"
LINES = (BASE, PMP, "fine-tuned", "untrained head")


@dataclass(frozen=True)
class Sweep:
    """One panel of Figure 4."""

    curves: dict[str, dict[float, Estimate]] = field(default_factory=dict)
    """Label -> place -> score."""
    columns: frozenset[str] = frozenset()
    """What is averaged: those that all places have."""


def draw(folder: Path, results: Sequence[Result], runs: Sequence[FineTune]) -> Picture | None:
    """Draw a row for GLUE and for each loss; panels density, learning rate, epochs."""
    groups = [[run for run in runs if not is_lm(run.task)]]
    groups += [own for task, own in by_task(runs).items() if is_lm(task)]
    rows = [
        (group, [_densities(results, group), *(_by_setting(group, n) for n in ("lr", "epochs"))])
        for group in groups
        if group
    ]
    if not any(sweep.curves for _, row in rows for sweep in row):
        return None
    figure, grid = panels(len(rows), 3, (11, 3.4 * len(rows) + 0.7))
    for axes_row, (group, row) in zip(grid, rows, strict=True):
        for axes, name, sweep in zip(axes_row, SWEPT, row, strict=True):
            _panel(axes, name, sweep, lm=is_lm(group[0].task))
    one_legend(figure, grid.flat, columns=4)
    picture = Picture(
        "figure4",
        "Score against mask density, learning rate and epochs of full fine-tuning.",
        "Figure 4. Full fine-tuning against density, learning rate and epochs; at each place "
        f"the best of the other settings. Density 1 is BASE. {INTERVALS}",
    )
    return save(figure, folder, picture, "Figure 4. Density, learning rate and epochs")


def _panel(axes: Axes, name: str, sweep: Sweep, *, lm: bool) -> None:
    axes.set_xlabel(name)
    if not sweep.curves:
        axes.set(xticks=[], yticks=[])
        not_run(axes)
        return
    for label, curve in sweep.curves.items():
        points = sorted(curve.items())
        intervals(axes, LINES.index(label), label, points, factor=1.0 if lm else 100.0, line="-")
    if name == "learning rate":
        axes.set_xscale("log")
    names = ordered(sweep.columns)
    axes.set_title(names[0] if len(names) == 1 else f"average of {len(names)} columns", fontsize=9)
    axes.set_ylabel("loss (nats per token), lower is better" if lm else "accuracy (%)")
    axes.grid(linewidth=0.3)


def _columns(runs: Sequence[FineTune]) -> frozenset[str]:
    return frozenset(column for run in runs for column in run.metrics)


def _main(found: Mapping[str, Estimate], columns: frozenset[str]) -> Estimate | None:
    """The average over GLUE, or the only column; None unless all ``columns`` are there."""
    if not columns or found.keys() - {AVERAGE} != columns:
        return None
    return found.get(AVERAGE) or (found[min(columns)] if len(columns) == 1 else None)


def _by_setting(group: Sequence[FineTune], name: str) -> Sweep:
    """BASE and PMP against a setting, wherever it has at least two values."""
    at: dict[tuple[str, float], list[FineTune]] = defaultdict(list)
    for arm in (BASE, PMP):
        for run in pick(group, arm, [FULL]):
            if run.setting(name) is not None:
                at[arm, float(run.setting(name))].append(run)
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
    at = {("fine-tuned", arms[arm]): pick(group, arm, [FULL]) for arm in arms}
    sweep = _sweep({place: own for place, own in at.items() if own})
    untrained = {
        density: found
        for arm, density in arms.items()
        if sweep.curves and (found := _main(heads(results, arm, "untrained-head"), sweep.columns))
    }
    return Sweep(sweep.curves | ({"untrained head": untrained} if untrained else {}), sweep.columns)


def _sweep(at: Mapping[tuple[str, float], Sequence[FineTune]]) -> Sweep:
    """(label, place) -> its runs, to curves over the columns that every place has."""
    if len({place for _, place in at}) < 2:
        return Sweep()
    shared = frozenset.intersection(*map(_columns, at.values()))
    curves: dict[str, dict[float, Estimate]] = defaultdict(dict)
    for (label, place), own in at.items():
        found = _main(tuned(run for run in own if set(run.metrics) <= shared), shared)
        if found is not None:
            curves[label][place] = found
    return Sweep(dict(curves), shared)
