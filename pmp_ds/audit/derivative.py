"""Attacks on a model that was fine-tuned with the ticket and published next to its base.

Units in the last place and gradients are ranked among elements of similar magnitude and gradient,
whose own information is public and has separate rows.
"""

from collections.abc import Callable

import torch

from pmp_ds.audit.attack import Attack, Finding
from pmp_ds.audit.case import Case
from pmp_ds.audit.training import mean_gradient

_BINS = 64
_PEAKED = 4  # ratio of unchanged elements to those changed by one unit, beyond rounding


def size(case: Case) -> Finding:
    """Rank by the size of the change: only elements of the ticket change, or change as in
    training."""
    change, ulps, _ = _changes(case)
    note = f"{float((ulps == 0).float().mean()):.2%} of the elements are unchanged"
    return Finding(note=note, scores=change.abs(), evidence=_proof(case, ulps))


def units(case: Case) -> Finding:
    """Rank by the change in units in the last place, which shows rounding."""
    _, ulps, base = _changes(case)
    return Finding(
        note=f"median {float(ulps.median()):.3g} units in the last place",
        scores=_among_alike(ulps, base.abs()),
    )


def along_gradient(case: Case) -> Finding:
    """Rank by descent: training goes down the gradient of its text, artificial changes do not."""
    assert case.text is not None
    change, _, _ = _changes(case)
    found, batches = mean_gradient(case.release.model(), case.text, case.seconds, signed=True)
    gradient = case.gather(found.__getitem__)
    down = float((change * gradient < 0).float().mean())
    note = f"{down:.2%} of the elements went down the gradient of {batches} batches"
    return Finding(note=note, scores=_among_alike(-change * gradient, gradient.abs()))


def _changes(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return change, its size in the coarser dtype's last place, and base weight, (n,) each."""
    assert case.derivative is not None
    tuned = case.derivative.tensor
    base, after = case.gather(case.release.tensor), case.gather(tuned)
    coarse = {
        min(case.release.tensor(name).dtype, tuned(name).dtype, key=lambda dtype: dtype.itemsize)
        for name in case.release.shapes
    }
    dtype = min(coarse, key=lambda dtype: dtype.itemsize)
    base, after = base.to(dtype).float(), after.to(dtype).float()
    place = base.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor().exp2()
    return after - base, (after - base).abs() / (place * torch.finfo(dtype).eps), base


def _proof(case: Case, ulps: torch.Tensor) -> bool | None:
    """Detect a leak without a ticket: more elements are unchanged than rounding explains, namely
    many times as many as moved by one unit in the last place."""
    if case.mask is not None:
        return None
    still, least = int((ulps == 0).sum()), int(((ulps > 0) & (ulps < 1.5)).sum())
    return 0 < still < len(ulps) and still > _PEAKED * max(least, len(ulps) // 1000)


def _among_alike(scores: torch.Tensor, what: torch.Tensor) -> torch.Tensor:
    """Return each score's rank among the elements with the nearest ``what``, (n,) in [0, 1]."""
    order = what.argsort(stable=True)
    places = torch.cat([_percentiles(scores[alike]) for alike in order.chunk(_BINS)])
    return places[order.argsort()]


def _percentiles(scores: torch.Tensor) -> torch.Tensor:
    """Return ranks in [0, 1]; equal scores share their middle rank."""
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - (counts + 1) / 2
    return (middle / len(scores))[place].float()


def _attack(
    name: str, run: Callable[[Case], Finding], *others: str, preventable: bool = True
) -> Attack:
    return Attack(
        name=f"derivative: {name}",
        needs=" and ".join(["a derivative trained with the ticket", *others]),
        run=run,
        inputs=("derivative", *others),
        preventable=preventable,
        countermeasure="no derivative is published"
        + (", or a dithered one (export.py --derivative)" if preventable else ""),
        use_quota=False,
    )


ATTACKS = (
    _attack("size of change", size),
    _attack("units in the last place", units),
    _attack("along the gradient", along_gradient, "text", preventable=False),
)
