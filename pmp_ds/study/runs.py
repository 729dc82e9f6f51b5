"""Fine-tuning runs of a study, and the fair choice of the best setting of a sweep.

A *cell* is one setting of the sweep (learning rate, epochs, ...) with all its seeds. Both sides of
a comparison choose among the same cells, those that both have completed, by the mean validation
score over seeds: for each task, so one model for MNLI-m and MNLI-mm. Cells with fewer seeds than
the fullest cell do not take part: they would win by luck.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pmp_ds.results import Result

LM = "LM"
COLUMNS = ("CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI-m", "MNLI-mm", "QNLI", "RTE")
AVERAGE = "average"
UNAUTHORIZED = ("full", "lora")
_NOT_A_CHOICE = frozenset(
    {"task", "method", "seed", "scratch", "ticket", "glue_dir", "store", "density"}
)

Unit = tuple[str, int]
"""What is drawn anew: (model digest, or "" where one model stands for the arm; seed)."""


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """One fine-tuning run; scores are fractions for GLUE, nats per token for LM."""

    arm: str
    task: str
    method: str
    scratch: bool
    seed: int
    model: str
    """Digest of the weights that were fine-tuned."""
    choice: tuple[tuple[str, Any], ...]
    """The settings a sweep varies, sorted."""
    metrics: Mapping[str, Mapping[str, float]]
    majority: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    primary: Mapping[str, str] = field(default_factory=dict)
    curve: Sequence[tuple[float, float]] = ()
    """(tokens, score or loss) while it was trained."""
    tokens: float | None = None

    def score(self, column: str, *, primary: bool = False) -> float:
        """Higher is better: the paper's accuracy-style score or, with ``primary``, the task's
        canonical one; minus the loss for LM."""
        values = self.metrics[column]
        if column == LM:
            return -values["loss"]
        return values[self.primary[column] if primary else "accuracy"]

    def setting(self, name: str) -> Any:
        return dict(self.choice).get(name)


def fine_tunes(results: Iterable[Result]) -> list[FineTune]:
    return [_fine_tune(result) for result in results if result.kind == "finetune"]


def _fine_tune(result: Result) -> FineTune:
    settings, values = result.settings, result.values
    choice = {
        name: value for name, value in settings.items()
        if name not in _NOT_A_CHOICE and not isinstance(value, (list, dict))
    }  # fmt: skip
    return FineTune(
        arm=result.arm,
        task=settings["task"],
        method=settings["method"],
        scratch=bool(settings.get("scratch", False)),
        seed=settings["seed"],
        model=result.model_digest,
        choice=tuple(sorted(choice.items())),
        metrics=values["metrics"],
        majority=values.get("majority", {}),
        primary=values.get("primary", {}),
        curve=_in_tokens(values.get("curve", ()), values.get("tokens")),
        tokens=values.get("tokens"),
    )


def _in_tokens(curve: Sequence[Sequence[float]], tokens: float | None) -> list[tuple[float, float]]:
    """A curve over examples or tokens, over tokens where their total is known."""
    scale = tokens / curve[-1][0] if curve and tokens and curve[-1][0] else 1.0
    return [(place * scale, value) for place, value in curve]


def pick(
    runs: Iterable[FineTune], *, arm: str | None = None, methods: Sequence[str] = UNAUTHORIZED,
    scratch: bool = False,
) -> list[FineTune]:  # fmt: skip
    """Runs of an arm (of any without one) with one of ``methods``."""
    return [
        run for run in runs
        if (arm is None or run.arm == arm) and run.method in methods and run.scratch == scratch
    ]  # fmt: skip


Cell = Any
"""What identifies a cell; see ``by_method`` and ``by_choice``."""


def by_method(run: FineTune) -> Cell:
    return run.method, run.choice


def by_choice(run: FineTune) -> Cell:
    """For two sides whose methods differ: the cells are shared whatever the method."""
    return tuple((name, value) for name, value in run.choice if not name.startswith("lora"))


def cells(runs: Iterable[FineTune], key: Callable[[FineTune], Cell]) -> dict[Cell, list[FineTune]]:
    """The completed cells of one arm and task."""
    found: dict[Cell, list[FineTune]] = defaultdict(list)
    for run in runs:
        found[key(run)].append(run)
    fullest = max((len({(r.model, r.seed) for r in group}) for group in found.values()), default=0)
    return {
        cell: group for cell, group in found.items()
        if len({(r.model, r.seed) for r in group}) == fullest
    }  # fmt: skip


def best(
    runs: Iterable[FineTune], grid: Iterable[Cell] | None = None,
    key: Callable[[FineTune], Cell] = by_method, *, primary: bool = False,
) -> list[FineTune]:  # fmt: skip
    """All seeds of the cell (and method) of one task with the best mean score, among ``grid``."""
    allowed = None if grid is None else set(grid)
    kept = [run for run in runs if allowed is None or key(run) in allowed]
    found = cells(kept, by_method)

    def mean(cell: Cell) -> float:
        scores = [run.score(c, primary=primary) for run in found[cell] for c in run.metrics]
        return sum(scores) / len(scores)

    return found[max(found, key=mean)] if found else []


def samples(runs: Sequence[FineTune], *, primary: bool = False) -> dict[str, dict[Unit, float]]:
    """column -> seed -> score. Several models of an arm (pretraining seeds) are averaged over their
    fine-tuning seeds and are the units themselves: that is the variation that counts."""
    models = sorted({run.model for run in runs})
    values: dict[str, dict[Unit, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        unit: Unit = ("", run.seed) if len(models) == 1 else (run.model, 0)
        for column in run.metrics:
            values[column][unit].append(run.score(column, primary=primary))
    return {c: {u: sum(v) / len(v) for u, v in units.items()} for c, units in values.items()}


def with_average(found: Mapping[str, Mapping[Unit, float]]) -> dict[str, Mapping[Unit, float]]:
    """Adds the mean over GLUE's columns, for the seeds that have them all; LM stays apart."""
    glue = [units for column, units in found.items() if column != LM]
    if len(glue) < 2:
        return dict(found)
    shared = set.intersection(*(set(units) for units in glue))
    average = {unit: sum(units[unit] for units in glue) / len(glue) for unit in shared}
    return {**found, AVERAGE: average} if average else dict(found)


def tasks(runs: Iterable[FineTune]) -> list[str]:
    return sorted({run.task for run in runs})


def ordered(columns: Iterable[str]) -> list[str]:
    """In the order of the paper's table; unknown ones, the average and LM last."""
    order = {column: i for i, column in enumerate((*COLUMNS, AVERAGE, LM))}
    return sorted(columns, key=lambda column: (order.get(column, len(COLUMNS) - 0.5), column))
