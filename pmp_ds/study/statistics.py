"""Means and differences with 95% confidence intervals and effect sizes, few seeds in mind."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean or a difference of means; the interval is None for one seed."""

    mean: float
    n: int
    """Seeds (pairs of seeds when ``paired``; of the smaller side otherwise)."""
    low: float | None = None
    high: float | None = None
    g: float | None = None
    """Hedges' g: the difference over the standard deviation (of the differences when paired),
    corrected for few seeds. None below three seeds and where nothing varies."""
    g_low: float | None = None
    g_high: float | None = None
    paired: bool = False

    @property
    def includes_zero(self) -> bool:
        """Chance alone could make it; also true of a single seed, which shows nothing."""
        return self.low is None or self.high is None or self.low <= 0.0 <= self.high

    def scaled(self, factor: float) -> "Estimate":
        """In another unit; ``factor`` > 0. The effect size has none."""
        low, high = (None if end is None else end * factor for end in (self.low, self.high))
        return Estimate(
            mean=self.mean * factor,
            n=self.n,
            low=low,
            high=high,
            g=self.g,
            g_low=self.g_low,
            g_high=self.g_high,
            paired=self.paired,
        )


def level(values: Sequence[float]) -> Estimate:
    """The mean of one group, with Student's interval."""
    array = np.asarray(values, dtype=float)
    if array.size == 1:
        return Estimate(mean=float(array[0]), n=1)
    low, high = _interval(array.mean(), array.std(ddof=1) / math.sqrt(array.size), array.size - 1)
    return Estimate(mean=float(array.mean()), n=array.size, low=low, high=high)


def difference(a: Mapping[Any, float], b: Mapping[Any, float]) -> Estimate | None:
    """Mean of ``a`` - mean of ``b``, each keyed by seed.

    Seeds that both have are compared in pairs (Student); without any, the two groups as they are
    (Welch). None when a side is empty.
    """
    if not (a and b):
        return None
    shared = sorted(a.keys() & b.keys(), key=str)
    if shared:
        return _paired(np.array([a[seed] - b[seed] for seed in shared]))
    return _welch(np.array(list(a.values())), np.array(list(b.values())))


def _paired(differences: np.ndarray) -> Estimate:
    n, mean = differences.size, float(differences.mean())
    if n == 1:
        return Estimate(mean=mean, n=1, paired=True)
    error = differences.std(ddof=1) / math.sqrt(n)
    low, high = _interval(mean, error, n - 1)
    g = _effect(mean, error, n - 1, math.sqrt(n))
    return Estimate(
        mean=mean, n=n, low=low, high=high, g=g[0], g_low=g[1], g_high=g[2], paired=True
    )


def _welch(a: np.ndarray, b: np.ndarray) -> Estimate:
    mean, n = float(a.mean() - b.mean()), min(a.size, b.size)
    if n == 1:
        return Estimate(mean=mean, n=1)
    parts = a.var(ddof=1) / a.size, b.var(ddof=1) / b.size
    error = math.sqrt(sum(parts))
    weights = parts[0] ** 2 / (a.size - 1) + parts[1] ** 2 / (b.size - 1)
    low, high = _interval(mean, error, error**4 / weights if weights else a.size + b.size - 2)
    freedom = a.size + b.size - 2
    pooled = ((a.size - 1) * a.var(ddof=1) + (b.size - 1) * b.var(ddof=1)) / freedom
    root = math.sqrt(a.size * b.size / (a.size + b.size))
    g = _effect(mean, math.sqrt(pooled) / root, freedom, root)
    return Estimate(mean=mean, n=n, low=low, high=high, g=g[0], g_low=g[1], g_high=g[2])


def _interval(mean: float, error: float, freedom: float) -> tuple[float, float]:
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * error)
    return float(mean) - half, float(mean) + half


def _effect(
    mean: float, error: float, freedom: int, root: float
) -> tuple[float | None, float | None, float | None]:
    """Hedges' g and its interval from the noncentral t distribution: ``mean / error`` has the
    noncentrality delta * ``root``. Two seeds have no corrected g."""
    if freedom < 2 or error <= 1e-12 * max(1.0, abs(mean)):
        return None, None, None
    t = mean / error
    correction = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2))
    correction /= math.sqrt(freedom / 2)
    shares = (1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2
    ends = [_noncentrality(t, freedom, share) for share in shares]
    low, high = (None if end is None else end * correction / root for end in ends)
    return float(t * correction / root), low, high


def _noncentrality(t: float, freedom: int, share: float) -> float | None:
    """The noncentrality under which ``share`` of all draws lie below ``t``."""
    if t < 0:
        mirrored = _noncentrality(-t, freedom, 1 - share)
        return None if mirrored is None else -mirrored
    try:
        return float(optimize.brentq(lambda c: stats.nct.cdf(t, freedom, c) - share, -5, 5 + 3 * t))
    except ValueError:  # beyond what double precision can tell
        return None
