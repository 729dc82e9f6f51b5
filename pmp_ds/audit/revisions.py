"""Attacks that compare the release with other weights of the same lineage."""

import math

import torch

from pmp_ds.audit.attack import Attack, Finding
from pmp_ds.audit.case import Case
from pmp_ds.audit.seeds import UNRELATED, initial_model

_BIN = 1e-3  # of the logarithm of a ratio
_WIDEST = 0.7
_SPIKE = 0.1  # of the elements in the highest bins
_STILL = 3 * _BIN


def known_base(case: Case) -> Finding:
    """Score by the difference from a base, or from another revision: what differs was trained."""
    assert case.base is not None
    base = case.base

    def differs(name: str) -> torch.Tensor:
        one, two = case.release.tensor(name), base.tensor(name)
        two = two[: len(one)] if one.ndim else two  # without rows that pad its vocabulary
        coarse = min((one.dtype, two.dtype), key=lambda dtype: dtype.itemsize)
        return one.to(coarse) != two.to(coarse)

    changed = case.gather(differs)
    share = float(changed.mean())
    note = f"{share:.2%} of the elements differ from --base"
    return Finding(note=note, scores=changed, evidence=0.0 < share < 1.0 - UNRELATED)


def decay(case: Case) -> Finding:
    """Detect weight decay on the complement, which shrinks it by one factor from the schedule."""
    if case.base is not None:
        reference, what = case.base.tensor, "--base"
    elif case.config is not None and case.config.init.seed is not None:
        initial = dict(initial_model(case.release, case.config.init.seed).named_parameters())
        reference, what = lambda name: initial[name].detach(), "theta(0) of the recipe's seed"
    else:
        return Finding(note="the attacker has no earlier weights", evidence=False)
    before = case.gather(reference)
    logs = (case.gather(case.release.tensor) / before).log()  # nan where the sign changed
    usable = logs.isfinite() & (logs.abs() < _WIDEST)
    counts = torch.histc(logs[usable], bins=int(2 * _WIDEST / _BIN), min=-_WIDEST, max=_WIDEST)
    # bf16 rounds a ratio by up to 2^-8, so the same factor fills several bins
    smooth = torch.nn.functional.avg_pool1d(counts[None, None], 9, 1, padding=4)[0, 0] * 9
    place = int(smooth.argmax())
    mode = -_WIDEST + (place + 0.5) * _BIN
    mode = float(logs[usable & ((logs - mode).abs() < 5 * _BIN)].median())
    share = float(smooth[place]) / len(logs)
    spike = share > _SPIKE and mode < -_STILL
    factor = math.exp(mode)
    note = f"against {what}: {share:.2%} of the elements shrank by one factor, {factor:.4f}"
    if not spike:
        return Finding(note=f"against {what}: no common factor", evidence=False)
    distance = torch.where(logs.isfinite(), (logs - mode).abs(), torch.tensor(10.0))
    return Finding(note=note, scores=distance, evidence=True)


ATTACKS = (
    Attack(
        name="weight decay of the complement",
        needs="earlier weights of the run",
        run=decay,
        preventable=True,
        countermeasure="the complement is frozen to the bit",
        use_quota=False,
    ),
    Attack(
        name="difference with a known base",
        needs="the weights it started from, or another revision",
        run=known_base,
        inputs=("base",),
        preventable=True,
        countermeasure="initial weights that never leave their owner; one public revision of a run",
        use_quota=False,
    ),
)
