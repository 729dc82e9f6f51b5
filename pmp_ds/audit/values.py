"""Attacks that need only the released weights."""

import torch

from pmp_ds.audit.attack import Attack, Finding
from pmp_ds.audit.case import Case

_BINS = 12  # few, because the smallest count estimates the frozen share
_WIDEST = 3.0  # standard deviations of the initial weights
_CENTRE = 2.0  # bins below this estimate how many weights never moved
_ROUNDING = 0.012  # three halves of bf16's distance between numbers above 1
_FAR = 0.05  # a typical constant that moved less may be unchanged after rounding


def magnitudes(case: Case) -> Finding:
    """Score by |w|: training makes weights larger."""
    scores = case.gather(lambda name: case.release.tensor(name).abs())
    return Finding(note="largest |w| of all", scores=scores)


def magnitudes_by_tensor(case: Case) -> Finding:
    """Score by each tensor's own probability that a weight was trained, from the excess of its
    magnitude over the initial distribution."""
    std = float(getattr(case.release.config, "initializer_range", 0.02))

    def score(name: str) -> torch.Tensor:
        stored = case.release.tensor(name).float()
        return _trained_probability(stored, std) if stored.ndim > 1 else torch.ones_like(stored)

    note = f"each tensor against a normal distribution of standard deviation {std:g}"
    return Finding(note=note, scores=case.gather(score))


def _trained_probability(weights: torch.Tensor, std: float) -> torch.Tensor:
    """Return 1 - p x N(w) / f(w): N is the initial density, f the tensor's own, and p the largest
    share of frozen weights that f allows."""
    size = weights.abs() / std
    edges = torch.linspace(0.0, _WIDEST, _BINS + 1)
    cumulative = torch.erf(edges / 2**0.5)
    expected = (cumulative[1:] - cumulative[:-1]) * size.numel()
    which = torch.bucketize(size, edges, right=True) - 1
    found = torch.bincount(which.clamp(max=_BINS).reshape(-1), minlength=_BINS + 1)[:_BINS].float()
    ratio = found.clamp(min=1.0) / expected
    frozen = float(ratio[edges[:-1] < _CENTRE].min().clamp(max=1.0))
    trained = torch.cat([1.0 - (frozen / ratio).clamp(0.0, 1.0), torch.ones(1)])
    return trained[which.clamp(max=_BINS)]


def constants(case: Case) -> Finding:
    """Find norms and biases that still equal their initial 0 or 1 exactly: they never moved."""
    only, moved, away = [], [], [torch.empty(0)]
    for name in case.release.shapes:
        here = case.release.tensor(name).reshape(-1)[case.positions(name)].float()
        start = _start_value(case.release.tensor(name))
        only.append(torch.full(here.shape, start is not None))
        moved.append((here != start).float() if start is not None else torch.ones_like(here))
        if start is not None:
            away.append((here - start).abs())
    distance = torch.cat(away)
    unmoved = int((distance == 0).sum())
    note = f"{unmoved:,} of {len(distance):,} norm and bias elements are exactly as they started"
    spike = _has_spike(distance)
    if spike:
        note += ", and hardly one is close to it"
    return Finding(note=note, scores=torch.cat(moved), evidence=spike, only=torch.cat(only))


def _start_value(stored: torch.Tensor) -> float | None:
    """Return 1 for gains, 0 for biases, None for random initial values."""
    if stored.ndim != 1:
        return None
    return 1.0 if float(stored.float().median()) > 0.5 else 0.0


def _has_spike(distance: torch.Tensor) -> bool:
    """Return whether far more elements are at the start than close to it, and others moved far."""
    moved = distance[distance > 0]
    typical = float(moved.median()) if len(moved) else 0.0
    close = int((moved <= max(0.1 * typical, _ROUNDING)).sum())
    return typical > _FAR and len(distance) - len(moved) > 4 * close + 4


ATTACKS = (
    Attack(
        name="norm and bias constants",
        needs="nothing",
        run=constants,
        preventable=True,
        countermeasure="mask.always_train: constants always train",
        use_quota=False,
    ),
    Attack(
        name="magnitudes",
        needs="nothing",
        run=magnitudes,
        preventable=False,
        countermeasure="mask.quota and mask.random_fraction weaken it",
    ),
    Attack(
        name="magnitudes by tensor",
        needs="the initial distribution",
        run=magnitudes_by_tensor,
        preventable=False,
        countermeasure="mask.quota and mask.random_fraction weaken it",
    ),
)
