"""What the report reads of a line of results.jsonl, by its kind, and of an audit.json.

A file may be a stranger's: ``check`` says of which type each field has to be.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from pmp_ds.fields import fit
from pmp_ds.results import Result

Metrics = dict[str, dict[str, float]]
"""Column, or task of a harness -> metric -> value."""
Curve = list[tuple[float, float]]
Lines = dict[str, list[list[float]]]
"""Way of matching norms -> losses by seed and alpha."""


class PretrainSettings(TypedDict):
    source: str
    density: float
    score: str | None
    tokens: int
    seed: int
    data: NotRequired[str]


class PretrainValues(TypedDict):
    val_loss: float
    curve: Curve
    iou: list[float]


class FinetuneSettings(TypedDict):
    task: str
    method: str
    scratch: bool
    seed: int
    data: NotRequired[str]
    mask: NotRequired[str]
    lr: NotRequired[float | None]
    epochs: NotRequired[float | None]
    steps: NotRequired[int | None]


class FinetuneValues(TypedDict):
    metrics: Metrics
    majority: Metrics
    primary: dict[str, str]
    curve: Curve


class HeadSettings(TypedDict):
    seed: NotRequired[int]


class HeadValues(TypedDict):
    metrics: Metrics
    majority: NotRequired[Metrics]


class TextSettings(TypedDict):
    store: str
    split: NotRequired[str]


class LossValues(TypedDict):
    loss: float


class AccuracyValues(TypedDict):
    accuracy: float


class Anything(TypedDict):
    """No field is read."""


class Tuned(TypedDict):
    alphas: list[float]
    losses: dict[str, list[float]]


class LandscapeValues(TypedDict):
    alphas: list[float]
    directions: dict[str, Lines]
    tuned: NotRequired[Tuned]


class Counts(TypedDict, total=False):
    ticket: int
    complement: int


class GradientValues(TypedDict):
    edges_log10: list[float]
    ticket: list[int]
    complement: list[int]
    zeros: NotRequired[Counts]
    auc: NotRequired[float | None]


class Attack(TypedDict):
    attack: str
    verdict: str
    auc: float | None
    auc_outside_embeddings: float | None
    iou: float | None
    chance_iou: float | None


class Audit(TypedDict):
    """An audit.json."""

    leaks: list[str]
    attacks: list[Attack]


KINDS: dict[str, tuple[Any, Any]] = {
    "pretrain": (PretrainSettings, PretrainValues),
    "finetune": (FinetuneSettings, FinetuneValues),
    "untrained-head": (HeadSettings, HeadValues),
    "zero-shot": (HeadSettings, HeadValues),
    "perplexity": (TextSettings, LossValues),
    "last_word": (Anything, AccuracyValues),
    "lm_eval": (Anything, HeadValues),
    "landscape": (Anything, LandscapeValues),
    "gradients": (Anything, GradientValues),
}
"""Types of `settings` and `values`."""


def check(path: Path, results: Iterable[Result]) -> list[Result]:
    """Return ``results``, read from ``path``, of the kinds that the report knows in full. Raises
    UserError that names the measurement and the field."""
    return [_checked(path, result) for result in results]


def _checked(path: Path, result: Result) -> Result:
    settings, values = KINDS.get(result.kind, (Anything, Anything))
    where = f"{path}: a line of kind {result.kind} ({result.arm})"
    return dataclasses.replace(
        result,
        settings=fit(settings, result.settings, f"{where}: settings"),
        values=fit(values, result.values, f"{where}: values"),
    )
