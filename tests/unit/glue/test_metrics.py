"""Metrics against formulas, scikit-learn and scipy, and answers worked out by hand."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from pmp_ds.errors import UserError
from pmp_ds.glue.metrics import majority, score
from pmp_ds.glue.tasks import TASKS

LABELS = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0])
PREDICTED = np.array([1, 1, 1, 1, 0, 0, 1, 0, 0, 0])  # 4 true and 1 false positive, 2 missed


def logits(predicted: np.ndarray, classes: int = 2) -> np.ndarray:
    """(n, classes) float32 whose argmax is ``predicted``."""
    noise = np.random.default_rng(0).random((len(predicted), classes), np.float32)
    return noise + 2 * np.eye(classes, dtype=np.float32)[predicted] - 5


def test_answers_worked_out_by_hand():
    found = score(TASKS["mrpc"], logits(PREDICTED), LABELS)
    assert found == {"accuracy": pytest.approx(0.7), "f1": pytest.approx(2 * 4 / (2 * 4 + 1 + 2))}
    found = score(TASKS["cola"], logits(PREDICTED), LABELS)
    mcc = (4 * 3 - 1 * 2) / np.sqrt((4 + 1) * (4 + 2) * (3 + 1) * (3 + 2))
    assert found == {"mcc": pytest.approx(mcc), "accuracy": pytest.approx(0.7)}


@pytest.mark.parametrize("name", ["sst2", "mnli", "qnli", "rte"])
def test_accuracy(name: str):
    classes = TASKS[name].num_outputs
    labels = np.arange(12) % classes
    predicted = labels.copy()
    predicted[:3] = (predicted[:3] + 1) % classes
    assert score(TASKS[name], logits(predicted, classes), labels) == {"accuracy": 0.75}


def test_as_scikit_learn_and_scipy():
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    found = score(TASKS["qqp"], logits(predicted), labels)
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, predicted), abs=1e-12)
    found = score(TASKS["cola"], logits(predicted), labels)
    assert found["mcc"] == pytest.approx(metrics.matthews_corrcoef(labels, predicted), abs=1e-12)
    similar = rng.integers(0, 26, 200).astype(np.float32) / 5  # with ties
    values = (similar + rng.normal(0, 1, 200)).astype(np.float32)
    found = score(TASKS["stsb"], values, similar)
    assert found["pearson"] == pytest.approx(np.corrcoef(values, similar)[0, 1], abs=1e-6)
    assert found["spearman"] == pytest.approx(
        np.corrcoef(stats.rankdata(values), stats.rankdata(similar))[0, 1], abs=1e-12
    )


def test_similarities_are_clipped_and_rounded():
    labels = np.array([0.0, 0.4, 2.0, 3.0, 5.0, 3.6, 2.5], np.float32)
    values = np.array([-7.0, 0.5, 1.5, 2.5, 6.2, 3.4, 1.8], np.float32)
    # rounded:          0    0    2    2    5    3    2    against 0 0 2 3 5 4 2
    assert score(TASKS["stsb"], values, labels)["accuracy"] == pytest.approx(5 / 7)


def test_correlation_is_of_the_values_as_they_are():
    labels = np.array([0, 1, 2, 3], np.float32)
    found = score(TASKS["stsb"], np.array([0, 1, 8, 27], np.float32), labels)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(44 / np.sqrt(5 * 470))
    assert score(TASKS["stsb"], 40 - 10 * labels, labels)["pearson"] == pytest.approx(-1.0)


@pytest.mark.filterwarnings("error")
def test_constant_predictions_correlate_with_nothing():
    ones = logits(np.ones(10, int))
    assert score(TASKS["cola"], ones, LABELS) == {"mcc": 0.0, "accuracy": 0.6}
    zeros = logits(np.zeros(10, int))
    assert score(TASKS["mrpc"], zeros, LABELS) == {"accuracy": 0.4, "f1": 0.0}
    similar = np.array([0, 1, 2, 3], np.float32)
    found = score(TASKS["stsb"], np.full(4, 2.0), similar)
    assert found == {"pearson": 0.0, "spearman": 0.0, "accuracy": 0.25}
    assert score(TASKS["stsb"], np.ones(1), np.ones(1, np.float32))["accuracy"] == 1.0


def test_majority_is_that_of_the_training_labels():
    train = np.array([0, 0, 0, 1, 1])
    assert majority(TASKS["sst2"], train, LABELS) == {"accuracy": 0.4}
    assert majority(TASKS["mrpc"], 1 - train, LABELS)["f1"] == pytest.approx(12 / 16)
    assert majority(TASKS["sst2"], np.array([0, 1]), LABELS) == {"accuracy": 0.4}
    assert majority(TASKS["mnli"], np.array([2, 2, 0]), np.array([2, 1, 2])) == {
        "accuracy": pytest.approx(2 / 3)
    }
    similar = np.array([1, 4, 3, 2], np.float32)
    assert majority(TASKS["stsb"], np.array([2.5, 5, 3.3], np.float32), similar) == {
        "pearson": 0.0,
        "spearman": 0.0,
        "accuracy": 0.25,  # mean 3.6, rounded 4
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_have_to_be_finite(bad: float):
    outputs = logits(PREDICTED)
    outputs[[2, 2, 7], [0, 1, 0]] = bad
    with pytest.raises(UserError, match="sst2: outputs for 2 of 10 rows are not finite"):
        score(TASKS["sst2"], outputs, LABELS)
    with pytest.raises(UserError, match="stsb: outputs for 1 of 2 rows"):
        score(TASKS["stsb"], np.array([bad, 1.0]), np.array([1.0, 2.0]))


def test_outputs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"outputs have shape \(10, 2\) instead of \(10, 3\)"):
        score(TASKS["mnli"], logits(PREDICTED), LABELS)
    with pytest.raises(ValueError, match=r"outputs have shape \(2, 1\) instead of \(2,\)"):
        score(TASKS["stsb"], np.ones((2, 1)), np.ones(2))
