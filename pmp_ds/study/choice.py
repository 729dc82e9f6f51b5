"""The fair choice of the best setting of a sweep, and the scores it comes to.

A *cell* is one setting of the sweep (learning rate, epochs, ...) with all its seeds. Both sides of
a comparison choose among the same cells, those that both have completed, by the mean validation
score over seeds: for each task, so one model for MNLI-m and MNLI-mm. Cells with fewer seeds than
the fullest cell do not take part: they would win by luck.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from pmp_ds.finetune.method import METHODS
from pmp_ds.study.runs import AVERAGE, FineTune, grouped, is_lm

Unit = tuple[str, int]
"""A run: (model digest, or "" where one model stands for the arm; seed of fine-tuning)."""

Cell = Any
"""What identifies a cell; see ``by_method`` and ``by_choice``."""


def by_method(run: FineTune) -> Cell:
    return run.method, run.choice


def by_choice(run: FineTune) -> Cell:
    """Identify a cell for two sides whose methods differ: settings of one method do not count."""
    own = {name for method in METHODS.values() for name in method.facts}
    return tuple((name, value) for name, value in run.choice if name.partition(".")[0] not in own)


def cells(runs: Iterable[FineTune], key: Callable[[FineTune], Cell]) -> dict[Cell, list[FineTune]]:
    """Return the completed cells of one arm and task."""
    found = grouped(runs, key)
    sizes = {cell: len({(run.model, run.seed) for run in group}) for cell, group in found.items()}
    fullest = max(sizes.values(), default=0)
    return {cell: group for cell, group in found.items() if sizes[cell] == fullest}


def best(
    runs: Iterable[FineTune],
    grid: Collection[Cell] | None = None,
    key: Callable[[FineTune], Cell] = by_method,
    *,
    primary: bool = False,
) -> list[FineTune]:
    """Return all seeds of the cell (and method) of one task with the best mean score, among
    ``grid``."""
    found = cells([run for run in runs if grid is None or key(run) in grid], by_method)

    def mean(group: Sequence[FineTune]) -> float:
        return fmean(run.score(c, primary=primary) for run in group for c in run.metrics)

    return max(found.values(), key=mean, default=[])


Scores = dict[str, dict[Unit, float]]
"""column -> run -> score."""


def samples(runs: Sequence[FineTune], *, primary: bool = False) -> Scores:
    """Return the scores of ``runs``. One model each makes two arms comparable seed by seed."""
    several = len({run.model for run in runs}) > 1
    values: dict[str, dict[Unit, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for column in run.metrics:
            unit = (run.model if several else "", run.seed)
            values[column][unit].append(run.score(column, primary=primary))
    return {c: {u: fmean(v) for u, v in units.items()} for c, units in values.items()}


def per_model(units: Mapping[Unit, float]) -> dict[Unit, float]:
    """Return each model's mean over its fine-tuning seeds, where an arm has several models
    (pretraining seeds): between arms it is their variation that counts."""
    models = defaultdict(list)
    for (model, _), value in units.items():
        models[model].append(value)
    if len(models) == 1:
        return dict(units)
    return {(model, 0): fmean(values) for model, values in models.items()}


def with_average(found: Scores) -> Scores:
    """Add the mean over GLUE's columns, for the seeds that have them all; LM stays apart."""
    glue = [units for column, units in found.items() if not is_lm(column)]
    if len(glue) < 2:
        return found
    shared = set.intersection(*map(set, glue))
    average = {unit: fmean(units[unit] for units in glue) for unit in shared}
    return {**found, AVERAGE: average} if average else found
