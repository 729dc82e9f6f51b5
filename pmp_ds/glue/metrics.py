"""GLUE's metrics of a model's outputs, and of the constant prediction to compare them with.

Every task has an `accuracy`: for CoLA that of the argmax, for STS-B the paper's auxiliary one,
which compares predictions and labels clipped to [0, 5] and rounded to the nearest integer (halves
to the even one: 2.5 to 2).
"""

import numpy as np
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from pmp_ds.errors import require
from pmp_ds.glue.tasks import MAX_SIMILARITY, Task


def score(task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return ``task.metrics`` of ``outputs``, logits (n, classes) or values (n,), for ``labels``.

    Undefined correlations and MCC (constant predictions or labels) count as 0.0, as does F1 without
    any positive. Raises UserError for outputs that are not finite.
    """
    shape = (len(labels),) if task.is_regression else (len(labels), task.num_outputs)
    if outputs.shape != shape:
        raise ValueError(f"{task.name}: outputs have shape {outputs.shape} instead of {shape}")
    bad = len(labels) - int(np.isfinite(outputs.reshape(len(labels), -1)).all(axis=1).sum())
    require(
        bad == 0,
        f"{task.name}: outputs for {bad} of {len(labels)} rows are not finite: the model diverged "
        "or its weights are damaged; use a lower learning rate",
    )
    predictions = outputs.astype(np.float64) if task.is_regression else outputs.argmax(axis=1)
    return {name: _METRICS[name](task, predictions, labels) for name in task.metrics}


def majority(task: Task, train_labels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return ``score`` of the constant prediction: the most frequent training class (the lowest if
    several), or the mean for regression."""
    if task.is_regression:
        outputs = np.full(len(labels), train_labels.mean(dtype=np.float64))
    else:
        counts = np.bincount(train_labels, minlength=task.num_outputs)
        outputs = np.tile(counts == counts.max(), (len(labels), 1))
    return score(task, outputs, labels)


def _accuracy(task: Task, predictions: np.ndarray, labels: np.ndarray) -> float:
    if task.is_regression:
        predictions, labels = (
            np.rint(np.clip(values, 0, MAX_SIMILARITY)) for values in (predictions, labels)
        )
    return float((predictions == labels).mean())


def _f1(task: Task, predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(f1_score(labels, predictions, zero_division=0.0))


def _mcc(task: Task, predictions: np.ndarray, labels: np.ndarray) -> float:
    if _is_constant(predictions, labels):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def _pearson(task: Task, predictions: np.ndarray, labels: np.ndarray) -> float:
    if _is_constant(predictions, labels):
        return 0.0
    return float(stats.pearsonr(predictions, labels.astype(np.float64)).statistic)


def _spearman(task: Task, predictions: np.ndarray, labels: np.ndarray) -> float:
    if _is_constant(predictions, labels):
        return 0.0
    return float(stats.spearmanr(predictions, labels).statistic)


def _is_constant(*arrays: np.ndarray) -> bool:
    return any(np.ptp(array) == 0 for array in arrays)


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "mcc": _mcc,
    "pearson": _pearson,
    "spearman": _spearman,
}
