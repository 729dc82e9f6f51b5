"""Fine-tuning runs of a study, and the fair choice of the best setting of a sweep.

A *cell* is one setting of the sweep (learning rate, epochs, ...) with all its seeds. Both sides of
a comparison choose among the same cells, those that both have completed, by the mean validation
score over seeds: for each task, so one model for MNLI-m and MNLI-mm. Cells with fewer seeds than
the fullest cell do not take part: they would win by luck.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pmp_ds.finetune.method import UNAUTHORIZED
from pmp_ds.results import Result

BASE, PMP, RANDOM = "base", "pmp", "random"
"""Arms with a role; results.jsonl names them so."""
LM = "LM"
"""Column of the task lm, nats per token; more letters follow where several texts were learned."""
CONTINUED = "LM pretraining"
"""Column of the task lm on the text of pretraining: pretraining that an attacker continues."""
COLUMNS = ("CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI-m", "MNLI-mm", "QNLI", "RTE")
AVERAGE = "average"
RECOVERED = "recovered"
"""Method: fine-tuned with a mask that is called otherwise than the model's own."""
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
    majority: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    primary: Mapping[str, str] = field(default_factory=dict)
    curve: Sequence[tuple[float, float]] = ()
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


def fine_tunes(results: Sequence[Result]) -> list[FineTune]:
    """All of them; texts that the task lm learned from are told apart."""
    found = [result for result in results if result.kind == "finetune"]
    pretraining = {r.settings.get("data") for r in results if r.kind == "pretrain"} - {None}
    texts = {r.settings.get("data") for r in found if r.settings["task"] == "lm"} - pretraining
    return [_fine_tune(result, _text(result, pretraining, len(texts))) for result in found]


def _text(result: Result, pretraining: set[Any], texts: int) -> str:
    """The column of the task lm."""
    data = result.settings.get("data")
    if data in pretraining:
        return CONTINUED
    return LM if texts <= 1 else f"{LM} {str(data)[:6]}"


def _fine_tune(result: Result, text: str) -> FineTune:
    settings, values = dict(result.settings), result.values
    if settings.get("steps"):
        settings.pop("epochs", None)  # a number of updates was asked for instead
    method, own = settings["method"], settings.get("mask", "own") == "own"
    lm = settings["task"] == "lm"
    return FineTune(
        arm=result.arm,
        task=text if lm else settings["task"],
        method=method if own else RECOVERED,
        scratch=settings["scratch"],
        seed=settings["seed"],
        model=result.model_digest,
        choice=tuple(sorted(_choices(settings))),
        metrics={text if lm else column: m for column, m in values["metrics"].items()},
        majority=values["majority"],
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
    *,
    arm: str | None = None,
    methods: Sequence[str] = UNAUTHORIZED,
    scratch: bool = False,
) -> list[FineTune]:
    """Runs of an arm (of any without one) with one of ``methods``."""
    return [
        run
        for run in runs
        if (arm is None or run.arm == arm) and run.method in methods and run.scratch == scratch
    ]


Cell = Any
"""What identifies a cell; see ``by_method`` and ``by_choice``."""


def by_method(run: FineTune) -> Cell:
    return run.method, run.choice


def by_choice(run: FineTune) -> Cell:
    """For two sides whose methods differ: the cells are shared whatever the method."""
    return tuple((name, value) for name, value in run.choice if not name.startswith("lora."))


def cells(runs: Iterable[FineTune], key: Callable[[FineTune], Cell]) -> dict[Cell, list[FineTune]]:
    """The completed cells of one arm and task."""
    found: dict[Cell, list[FineTune]] = defaultdict(list)
    for run in runs:
        found[key(run)].append(run)
    fullest = max((len({(r.model, r.seed) for r in group}) for group in found.values()), default=0)
    return {
        cell: group
        for cell, group in found.items()
        if len({(r.model, r.seed) for r in group}) == fullest
    }


def best(
    runs: Iterable[FineTune],
    grid: Iterable[Cell] | None = None,
    key: Callable[[FineTune], Cell] = by_method,
    *,
    primary: bool = False,
) -> list[FineTune]:
    """All seeds of the cell (and method) of one task with the best mean score, among ``grid``."""
    allowed = None if grid is None else set(grid)
    kept = [run for run in runs if allowed is None or key(run) in allowed]
    found = cells(kept, by_method)

    def mean(cell: Cell) -> float:
        scores = [run.score(c, primary=primary) for run in found[cell] for c in run.metrics]
        return sum(scores) / len(scores)

    return found[max(found, key=mean)] if found else []


def samples(runs: Sequence[FineTune], *, primary: bool = False) -> dict[str, dict[Unit, float]]:
    """column -> run -> score. One model each makes two arms comparable seed by seed."""
    several = len({run.model for run in runs}) > 1
    values: dict[str, dict[Unit, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        unit: Unit = (run.model if several else "", run.seed)
        for column in run.metrics:
            values[column][unit].append(run.score(column, primary=primary))
    return {c: {u: sum(v) / len(v) for u, v in units.items()} for c, units in values.items()}


def per_model(units: Mapping[Unit, float]) -> dict[Unit, float]:
    """Each model's mean over its fine-tuning seeds, where an arm has several models (pretraining
    seeds): between arms it is their variation that counts."""
    if len({model for model, _ in units}) == 1:
        return dict(units)
    found: dict[Unit, list[float]] = defaultdict(list)
    for (model, _), value in units.items():
        found[model, 0].append(value)
    return {unit: sum(values) / len(values) for unit, values in found.items()}


def with_average(found: Mapping[str, Mapping[Unit, float]]) -> dict[str, Mapping[Unit, float]]:
    """Adds the mean over GLUE's columns, for the seeds that have them all; LM stays apart."""
    glue = [units for column, units in found.items() if not is_lm(column)]
    if len(glue) < 2:
        return dict(found)
    shared = set.intersection(*(set(units) for units in glue))
    average = {unit: sum(units[unit] for units in glue) / len(glue) for unit in shared}
    return {**found, AVERAGE: average} if average else dict(found)


def tasks(runs: Iterable[FineTune]) -> list[str]:
    return sorted({run.task for run in runs})


def ordered(columns: Iterable[str]) -> list[str]:
    """In the order of the paper's table; the average and losses last."""
    order = {column: i for i, column in enumerate((*COLUMNS, AVERAGE))}
    return sorted(columns, key=lambda column: (is_lm(column), order.get(column, -1), column))
