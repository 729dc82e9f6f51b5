"""Intervals and effect sizes against hand-worked and published answers."""

import math

import pytest
from scipy import stats

from pmp_ds.study.statistics import difference, level


def test_paired_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1, error 1/sqrt(3), t of 2 degrees 4.302653."""
    found = difference({0: 2.0, 1: 4.0, 2: 6.0, 9: 100.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert found is not None
    assert found.paired
    assert found.n == 3  # seed 9 has no partner
    half = 4.302653 / math.sqrt(3)
    assert found.interval == pytest.approx((2 - half, 2 + half), abs=1e-5)
    assert found.includes_zero
    # Hedges: 2 * Gamma(1) / (sqrt(1) * Gamma(1/2)) = 2 / sqrt(pi)
    assert found.g == pytest.approx(2 / math.sqrt(math.pi), abs=1e-9)


def test_welch_equals_scipy():
    a, b = [5.1, 5.3, 4.9, 5.6], [4.0, 4.9, 4.4]
    found = difference(dict(enumerate(a)), dict(enumerate(b, start=10)))
    assert found is not None
    assert not found.paired
    assert found.n == 3
    reference = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert found.interval == pytest.approx((reference.low, reference.high))
    pooled = math.sqrt((3 * stats.tvar(a) + 2 * stats.tvar(b)) / 5)
    correction = math.gamma(2.5) / (math.sqrt(2.5) * math.gamma(2))
    assert found.g == pytest.approx(found.mean / pooled * correction)


@pytest.mark.parametrize("sign", [1, -1])
def test_interval_of_the_effect_has_its_coverage_at_the_ends(sign: int):
    """At either end of the interval, the t that was seen has probability 2.5% or 97.5%."""
    values = [sign * v for v in (0.9, 1.4, 1.1, 2.0, 1.7)]
    found = difference(dict(enumerate(values)), dict.fromkeys(range(5), 0.0))
    assert found is not None
    assert found.g is not None
    assert found.g_interval is not None
    low, high = found.g_interval
    t = stats.ttest_1samp(values, 0.0).statistic
    correction = math.gamma(2) / (math.sqrt(2) * math.gamma(1.5))
    shares = [stats.nct.cdf(t, 4, end / correction * math.sqrt(5)) for end in (low, high)]
    assert shares == pytest.approx([0.975, 0.025], abs=1e-6)
    assert low < found.g < high


def test_one_seed_shows_nothing():
    found = difference({0: 3.0}, {0: 1.0})
    assert found is not None
    assert (found.mean, found.n, found.interval, found.g) == (2.0, 1, None, None)
    assert found.includes_zero
    assert level([4.0]).interval is None
    assert difference({}, {0: 1.0}) is None


def test_no_variation_has_no_effect_size():
    found = difference({0: 3.0, 1: 4.0, 2: 5.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert found is not None
    assert (found.interval, found.g) == ((2.0, 2.0), None)
    assert not found.includes_zero


def test_scaled_keeps_the_effect_size():
    found = difference({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert found is not None
    in_points = found.scaled(100)
    assert (in_points.mean, in_points.g, in_points.paired) == (200.0, found.g, True)


def test_level_equals_scipy():
    values = [0.2, 0.5, 0.4]
    reference = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert level(values).interval == pytest.approx((reference.low, reference.high))
