"""Fine-tuning runs of a study, as the report reads them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pmp_ds.finetune.method import RECOVERED, Method, Role, reported
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
    {
        "task",
        "method",
        "seed",
        "scratch",
        "density",
        "mask",
        "ticket",
        "micro_batch_size",
        "val_blocks",
    }
)


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
        """Return a number of which higher is better: the paper's accuracy-style score or, with
        ``primary``, the task's canonical one; minus the loss for LM."""
        values = self.metrics[column]
        if is_lm(column):
            return -values["loss"]
        return values[self.primary[column] if primary else "accuracy"]

    def setting(self, name: str) -> Any:
        return dict(self.choice).get(name)


def is_lm(name: str) -> bool:
    """Return whether a task or a column is a loss, so that lower is better."""
    return name.lower().startswith("lm")


def unit(column: str) -> str:
    """Return the unit of a difference."""
    return "nats per token" if is_lm(column) else "points"


def digits(column: str) -> int:
    """Return how many digits tables show behind the point."""
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
    return dict(sorted(grouped(runs, lambda run: run.task).items()))


def grouped(runs: Iterable[FineTune], key: Callable[[FineTune], Any]) -> dict[Any, list[FineTune]]:
    """Return the runs of each value of ``key``, in their order."""
    found = defaultdict(list)
    for run in runs:
        found[key(run)].append(run)
    return found


def ordered(columns: Iterable[str]) -> list[str]:
    """Return ``columns`` in the order of the paper's table; the average and losses last."""
    order = {column: i for i, column in enumerate((*COLUMNS, AVERAGE))}
    return sorted(columns, key=lambda column: (is_lm(column), order.get(column, -1), column))
