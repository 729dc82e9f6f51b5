"""AUC and IoU worked out by hand."""

import pytest
import torch

from pmp_ds.audit.measure import auc, chance_iou, recovered_iou


def on(*indices: int, of: int = 10) -> torch.Tensor:
    labels = torch.zeros(of, dtype=torch.bool)
    labels[list(indices)] = True
    return labels


def test_perfect_and_reversed():
    scores = torch.arange(10.0)
    assert auc(scores, on(7, 8, 9)) == 1.0
    assert auc(-scores, on(7, 8, 9)) == 0.0
    assert recovered_iou(scores, on(7, 8, 9)) == 1.0
    assert recovered_iou(-scores, on(7, 8, 9)) == 0.0


def test_by_hand_with_ties():
    # kept: 3, 1, 1; others: 2, 1, 0. Pairs won: 3 of 3; then 1.5 of 3 for each kept 1
    scores, labels = torch.tensor([3.0, 1, 1, 2, 1, 0]), on(0, 1, 2, of=6)
    assert auc(scores, labels) == pytest.approx((3 + 1.5 + 1.5) / 9)
    # the top three: 3, 2 and one of the three 1s, of which two are kept: 1 + 2/3 in common
    assert recovered_iou(scores, labels) == pytest.approx((5 / 3) / (6 - 5 / 3))


def test_a_constant_score_is_chance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(10_000, generator=generator) < 0.7
    assert auc(torch.ones(10_000), labels) == 0.5
    assert recovered_iou(torch.ones(10_000), labels) == pytest.approx(chance_iou(labels))
    assert chance_iou(labels) == pytest.approx(0.538, abs=0.01)


def test_one_kind_has_no_auc():
    assert auc(torch.arange(3.0), on(0, 1, 2, of=3)) is None
    assert auc(torch.arange(3.0), on(of=3)) is None
    assert recovered_iou(torch.arange(3.0), on(0, 1, 2, of=3)) == 1.0
