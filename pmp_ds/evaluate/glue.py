"""GLUE without fine-tuning: zero-shot by likelihood, untrained heads (the paper's Base rows)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pmp_ds.evaluate.subject import Subject
from pmp_ds.evaluate.zero_shot import untrained_head, zero_shot
from pmp_ds.glue import metrics
from pmp_ds.glue.read import Rows, TaskData
from pmp_ds.progress import Progress

MAX_LENGTH = 256
"""Maximum tokens of a prompt with its answer, or of a row under a head."""


def zero_shot_values(subject: Subject, data: TaskData, batch_size: int) -> dict[str, Any]:
    """Return `metrics` and `majority` by column of the paper's table."""
    with _bar(f"zero-shot {data.task.name}", data) as bar:
        return values(
            data,
            lambda rows: zero_shot(
                subject.model, subject.tokenizer, data.task, rows, batch_size, MAX_LENGTH, bar
            ),
        )


def head_values(subject: Subject, data: TaskData, seed: int, batch_size: int) -> dict[str, Any]:
    """Return the same under a head drawn by ``seed``."""
    device = str(subject.model.device)
    with _bar(f"untrained head {data.task.name}, seed {seed}", data) as bar:
        return values(
            data,
            lambda rows: untrained_head(
                subject.folder, data.task, rows, seed, batch_size, MAX_LENGTH, device, bar
            ),
        )


def values(data: TaskData, outputs: Callable[[Rows], np.ndarray]) -> dict[str, Any]:
    """Return the scores of ``outputs`` on the validation rows, and of the constant prediction."""
    columns: Mapping[str, Rows] = data.validation
    return {
        "metrics": {c: metrics.score(data.task, outputs(r), r.labels) for c, r in columns.items()},
        "majority": {
            c: metrics.majority(data.task, data.train.labels, r.labels) for c, r in columns.items()
        },
    }


def data_settings(data: TaskData) -> dict[str, Any]:
    """Return the task and digests of the rows that were read."""
    digests = {column: rows.sha256[:16] for column, rows in data.validation.items()}
    return {"task": data.task.name, "validation": digests, "train": data.train.sha256[:16]}


def _bar(what: str, data: TaskData) -> Progress:
    return Progress(what, "row", sum(map(len, data.validation.values())))
