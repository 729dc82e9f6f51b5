"""The eight GLUE tasks behind the paper's nine columns: their rows and metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pmp_ds.errors import UserError, did_you_mean

MAX_SIMILARITY = 5.0
"""Labels of a regression task (STS-B) lie in [0, MAX_SIMILARITY]."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of GLUE (Wang et al., 2018)."""

    name: str
    """The name in settings and on the Hugging Face hub, such as `sst2`."""
    folder: str
    """The name in GLUE's own layout, such as `SST-2`."""
    fields: tuple[str, ...]
    """The fields of the one or two texts of a row."""
    labels: tuple[str, ...] | None
    """The word for every class, in the order of the integers; None for regression."""
    metrics: tuple[str, ...]
    """The names of metrics.score's results: GLUE's own, and the paper's accuracy."""
    splits: Mapping[str, str]
    """Validation split -> column of the paper's table."""
    prompt: str
    """The zero-shot prompt for a language model, with field names in braces."""
    answers: tuple[str, ...]
    """Its answer for every label, in the order of ``labels``; for regression, the words for 0, 1, 2
    and so on."""

    @property
    def primary(self) -> str:
        """The metric that selects among runs and fills a table's cell."""
        return self.metrics[0]

    @property
    def is_regression(self) -> bool:
        return self.labels is None

    @property
    def num_outputs(self) -> int:
        """Number of classes, or 1 for regression: `num_labels` of transformers."""
        return 1 if self.labels is None else len(self.labels)


def _task(
    name: str,
    folder: str,
    fields: tuple[str, ...],
    labels: tuple[str, ...] | None,
    prompt: str,
    answers: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    splits: Mapping[str, str] | None = None,
) -> Task:
    return Task(
        name=name,
        folder=folder,
        fields=fields,
        labels=labels,
        metrics=metrics,
        splits=MappingProxyType({"validation": folder} if splits is None else dict(splits)),
        prompt=prompt,
        answers=answers,
    )


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_ALL = (
    _task(
        "cola",
        "CoLA",
        ("sentence",),
        ("unacceptable", "acceptable"),
        "Sentence: {sentence}\nIs the grammar correct, yes or no? Answer:",
        ("no", "yes"),
        metrics=("mcc", "accuracy"),
    ),
    _task(
        "sst2",
        "SST-2",
        ("sentence",),
        ("negative", "positive"),
        "Review: {sentence}\nThe review is",
        ("negative", "positive"),
    ),
    _task(
        "mrpc",
        "MRPC",
        _PAIR,
        ("not_equivalent", "equivalent"),
        "First: {sentence1}\nSecond: {sentence2}\nDo both say the same, yes or no? Answer:",
        ("no", "yes"),
        metrics=("accuracy", "f1"),
    ),
    _task(
        "qqp",
        "QQP",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        "First: {question1}\nSecond: {question2}\nIs it the same question, yes or no? Answer:",
        ("no", "yes"),
        metrics=("accuracy", "f1"),
    ),
    _task(
        "stsb",
        "STS-B",
        _PAIR,
        None,
        "First: {sentence1}\nSecond: {sentence2}\nSimilarity from 0 to 5 (the same). Answer:",
        ("0", "1", "2", "3", "4", "5"),
        metrics=("pearson", "spearman", "accuracy"),
    ),
    _task(
        "mnli",
        "MNLI",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "Text: {premise}\nClaim: {hypothesis}\nIs the claim true, yes, no or maybe? Answer:",
        ("yes", "maybe", "no"),
        splits={"validation_matched": "MNLI-m", "validation_mismatched": "MNLI-mm"},
    ),
    _task(
        "qnli",
        "QNLI",
        ("question", "sentence"),
        _ENTAILMENT,
        "Question: {question}\nText: {sentence}\nIs the answer in the text, yes or no? Answer:",
        ("yes", "no"),
    ),
    _task(
        "rte",
        "RTE",
        _PAIR,
        _ENTAILMENT,
        "Text: {sentence1}\nClaim: {sentence2}\nIs the claim true, yes or no? Answer:",
        ("yes", "no"),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}

COLUMNS: tuple[str, ...] = tuple(column for task in _ALL for column in task.splits.values())
"""The paper's nine columns, in its order."""


def find_task(name: str) -> Task:
    """Return the task called ``name``. Raises UserError that lists all names."""
    if name in TASKS:
        return TASKS[name]
    plain = name.lower().replace("-", "").replace("_", "")
    guess = did_you_mean(plain, TASKS)
    raise UserError(f"unknown task {name!r}{guess}; the tasks are {', '.join(TASKS)}")
