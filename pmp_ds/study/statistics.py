"""Means and differences with 95% confidence intervals and effect sizes, few seeds in mind."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean or a difference of means."""

    mean: float
    n: int
    """Seeds (pairs of seeds when ``paired``; of the smaller side otherwise)."""
    interval: Interval | None = None
    """None for one seed."""
    g: float | None = None
    """Hedges' g: the difference over the standard deviation (of the differences when paired),
    corrected for few seeds. None below three seeds and where nothing varies."""
    g_interval: Interval | None = None
    paired: bool = False

    @property
    def includes_zero(self) -> bool:
        """Chance alone could make it; also true of a single seed, which shows nothing."""
        return self.interval is None or self.interval[0] <= 0.0 <= self.interval[1]

    def scaled(self, factor: float) -> "Estimate":
        """Return it in another unit; ``factor`` > 0. The effect size has none."""
        ends = self.interval and (self.interval[0] * factor, self.interval[1] * factor)
        return replace(self, mean=self.mean * factor, interval=ends)


def level(values: Sequence[float]) -> Estimate:
    """Return the mean of one group, with Student's interval."""
    interval = None if len(values) == 1 else _interval(_test(stats.ttest_1samp, values, 0.0))
    return Estimate(mean=float(np.mean(values)), n=len(values), interval=interval)


def difference(a: Mapping[Any, float], b: Mapping[Any, float]) -> Estimate | None:
    """Return mean of ``a`` - mean of ``b``, each keyed by seed; None when a side is empty.

    Seeds that both have are compared in pairs (Student); without any, the two groups as they are
    (Welch).
    """
    if not (a and b):
        return None
    if shared := sorted(a.keys() & b.keys(), key=str):
        return _paired([a[seed] - b[seed] for seed in shared])
    return _unpaired(list(a.values()), list(b.values()))


def _paired(differences: Sequence[float]) -> Estimate:
    found = replace(level(differences), paired=True)
    if found.n == 1:
        return found
    return _with_effect(found, _test(stats.ttest_1samp, differences, 0.0), math.sqrt(found.n))


def _unpaired(a: Sequence[float], b: Sequence[float]) -> Estimate:
    found = Estimate(mean=float(np.mean(a) - np.mean(b)), n=min(len(a), len(b)))
    if found.n == 1:
        return found
    welch, pooled = (_test(stats.ttest_ind, a, b, equal_var=equal) for equal in (False, True))
    root = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    return _with_effect(replace(found, interval=_interval(welch)), pooled, root)


def _test(test: Callable[..., Any], *samples: Any, **options: Any) -> Any:
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # nothing varies
        return test(*samples, **options)


def _interval(test: Any) -> Interval:
    low, high = test.confidence_interval(CONFIDENCE)
    return float(low), float(high)


def _with_effect(found: Estimate, test: Any, root: float) -> Estimate:
    """Add Hedges' g and its interval from the noncentral t distribution: the statistic of ``test``
    has the noncentrality delta * ``root``. Two seeds have no corrected g."""
    low, high = found.interval or (found.mean, found.mean)
    t, freedom = float(test.statistic), float(test.df)
    if freedom < 2 or high - low <= 1e-12 * max(1.0, abs(found.mean)):
        return found
    unbiased = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2))
    unbiased /= math.sqrt(freedom / 2) * root
    ends = [_noncentrality(t, freedom, (1 + side * CONFIDENCE) / 2) for side in (1, -1)]
    known = [end * unbiased for end in ends if end is not None]
    g_interval = (known[0], known[1]) if len(known) == 2 else None
    return replace(found, g=t * unbiased, g_interval=g_interval)


def _noncentrality(t: float, freedom: float, share: float) -> float | None:
    """Return the noncentrality under which ``share`` of all draws lie below ``t``."""
    if t < 0:
        mirrored = _noncentrality(-t, freedom, 1 - share)
        return None if mirrored is None else -mirrored
    try:
        return float(optimize.brentq(lambda c: stats.nct.cdf(t, freedom, c) - share, -5, 5 + 3 * t))
    except ValueError:  # beyond what double precision can tell
        return None
