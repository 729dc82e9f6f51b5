"""Learning of the guard from the loss. Its policies are in tests/distributed/test_guard.py."""

import math
import random
import statistics

import pytest

from pmp_ds.watch.guard import Guard, straggler


def learned(losses: list[float]) -> dict[str, float]:
    guard = Guard.__new__(Guard)  # learning needs neither an engine nor other ranks
    guard.memory = {"count": 0.0, "mean": 0.0, "var": 0.0}
    for loss in losses:
        guard._learn(loss)
    return guard.memory


def test_first_ones_are_weighted_alike():
    losses = [random.Random(n).uniform(2, 6) for n in range(40)]
    memory = learned(losses)
    assert memory["count"] == 40
    assert memory["mean"] == pytest.approx(statistics.fmean(losses))
    assert memory["var"] == pytest.approx(statistics.pvariance(losses))


def test_later_ones_forget_the_first():
    """After 300 updates at another level, 0.98^300 = 0.2% of the first level is left."""
    memory = learned([8.0] * 100 + [2.0] * 300)
    assert memory["mean"] == pytest.approx(2.0 + 6.0 * 0.98**300)
    assert math.sqrt(memory["var"]) < 0.5


def test_three_losses_by_hand():
    memory = learned([1.0, 2.0, 6.0])
    assert memory["mean"] == pytest.approx(3.0)
    assert memory["var"] == pytest.approx((4 + 1 + 9) / 3)


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ([0.1, 0.1, 0.8, 0.1], (2, 0.1)),  # 8 times as long, and 0.7 s
        ([0.1, 0.1, 0.5, 0.1], None),  # 5 times as long, but 0.4 s
        ([4.0, 4.0, 7.0, 4.0], None),  # 3 s, but less than twice as long
        ([4.0, 9.0], (1, 4.0)),
        ([1.0], None),
        ([0.0, 0.0], None),
    ],
)
def test_straggler_by_hand(seconds, found):
    assert straggler(seconds, factor=2.0, floor=0.5) == found
