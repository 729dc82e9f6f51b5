"""Fine-tuning runs of a study, and the fair choice of the best setting of a sweep.

A *cell* is one setting of the sweep (learning rate, epochs, ...) with all its seeds. Both sides of
a comparison choose among the same cells, those that both have completed, by the mean validation
score over seeds: for each task, so one model for MNLI-m and MNLI-mm. Cells with fewer seeds than
the fullest cell do not take part: they would win by luck.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pmp_ds.finetune.method import METHODS, RECOVERED, Method, Role, reported
from pmp_ds.results import Result

BASE, PMP, RANDOM = "base", "pmp", "random"
"""Arms with a role; results.jsonl names them so."""
LM = "LM"
"""Column of the task lm, nats per token; more letters follow where several texts were learned."""
CONTINUED = "LM pretraining"
"""Column of the task lm on the text of pretraining: pretraining that an attacker continues."""
COLUMNS = ("CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI-m", "MNLI-mm", "QNLI", "RTE")
AVERAGE = "Average"
_NOT_A_CHOICE = frozenset(
    {"task", "method", "seed", "scratch", "density", "mask", "micro_batch_size", "val_blocks"}
)

Unit = tuple[str, int]
"""A run: (model digest, or "" where one model stands for the arm; seed of fine-tuning)."""


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
    primary: Mapping[str, str]
    curve: Sequence[tuple[float, float]]
    """(tokens, primary metric of the first column) while it was trained."""

    def score(self, column: str, *, primary: bool = False) -> float:
        """Higher is better: the paper's accuracy-style score or, with ``primary``, the task's
        canonical one; minus the loss for LM."""
        values = self.metrics[column]
        if is_lm(column):
            return -values["loss"]
        return values[self.primary[column] if primary else "accuracy"]

    def setting(self, name: str) -> Any:
        return dict(self.choice).get(name)


def is_lm(name: str) -> bool:
    """Of a task or a column: a loss, lower is better."""
    return name.lower().startswith("lm")


def unit(column: str) -> str:
    """Of a difference."""
    return "nats per token" if is_lm(column) else "points"


def digits(column: str) -> int:
    """Behind the point, in tables."""
    return 4 if is_lm(column) else 2


def fine_tunes(results: Sequence[Result]) -> list[FineTune]:
    """Return all of them; texts that the task lm learned from are told apart."""
    found = [result for result in results if result.kind == "finetune"]
    pretraining = {r.settings.get("data") for r in results if r.kind == "pretrain"} - {None}
    texts = {r.settings.get("data") for r in found if r.settings["task"] == "lm"} - pretraining
    return [_fine_tune(result, _text(result, pretraining, len(texts))) for result in found]


def _text(result: Result, pretraining: set[Any], texts: int) -> str:
    """Return the column of the task lm."""
    data = result.settings.get("data")
    if data in pretraining:
        return CONTINUED
    return LM if texts <= 1 else f"{LM} {str(data)[:6]}"


def _fine_tune(result: Result, text: str) -> FineTune:
    settings, values = dict(result.settings), result.values
    if settings.get("steps"):
        settings.pop("epochs", None)  # a number of updates was asked for instead
    lm = settings["task"] == "lm"
    return FineTune(
        arm=result.arm,
        task=text if lm else settings["task"],
        method=settings["method"] if settings.get("mask", "own") == "own" else RECOVERED.name,
        scratch=settings["scratch"],
        seed=settings["seed"],
        model=result.model_digest,
        choice=tuple(sorted(_choices(settings))),
        metrics={text if lm else column: m for column, m in values["metrics"].items()},
        primary={text if lm else column: m for column, m in values["primary"].items()},
        curve=[(tokens, value) for tokens, value in values["curve"]],
    )


def _choices(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _choices(value, f"{name}.")
        elif name not in _NOT_A_CHOICE:
            yield prefix + name, tuple(value) if isinstance(value, list) else value


def pick(
    runs: Iterable[FineTune],
    arm: str | None = None,
    methods: Iterable[Method] | None = None,
    *,
    scratch: bool = False,
) -> list[FineTune]:
    """Return the runs of an arm (of any without one) with one of ``methods``: those of an attacker
    unless it says otherwise."""
    names = {m.name for m in (reported(Role.ATTACK) if methods is None else methods)}
    return [
        run
        for run in runs
        if arm in (None, run.arm) and run.method in names and run.scratch == scratch
    ]


def by_task(runs: Iterable[FineTune]) -> dict[str, list[FineTune]]:
    """Return the runs of each task, the tasks sorted."""
    return dict(sorted(_grouped(runs, lambda run: run.task).items()))


def _grouped(runs: Iterable[FineTune], key: Callable[[FineTune], Any]) -> dict[Any, list[FineTune]]:
    found = defaultdict(list)
    for run in runs:
        found[key(run)].append(run)
    return found


Cell = Any
"""What identifies a cell; see ``by_method`` and ``by_choice``."""


def by_method(run: FineTune) -> Cell:
    return run.method, run.choice


def by_choice(run: FineTune) -> Cell:
    """For two sides whose methods differ: what is a method's own setting does not count."""
    own = {name for method in METHODS.values() for name in method.facts}
    return tuple((name, value) for name, value in run.choice if name.partition(".")[0] not in own)


def cells(runs: Iterable[FineTune], key: Callable[[FineTune], Cell]) -> dict[Cell, list[FineTune]]:
    """Return the completed cells of one arm and task."""
    found = _grouped(runs, key)
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
    """Return their scores. One model each makes two arms comparable seed by seed."""
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


def ordered(columns: Iterable[str]) -> list[str]:
    """Return ``columns`` in the order of the paper's table; the average and losses last."""
    order = {column: i for i, column in enumerate((*COLUMNS, AVERAGE))}
    return sorted(columns, key=lambda column: (is_lm(column), order.get(column, -1), column))
