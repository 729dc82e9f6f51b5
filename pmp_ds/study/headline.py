"""The six numbers of a study and the sentence they imply. A positive number is what the owner of
the private mask wants, throughout.

Units: accuracy in percentage points, losses in nats per token.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from pmp_ds.results import Result
from pmp_ds.study.attacker import Tokens, attacker_tokens
from pmp_ds.study.runs import (
    AVERAGE,
    BASE,
    PMP,
    Cell,
    FineTune,
    Unit,
    best,
    by_choice,
    by_method,
    cells,
    is_lm,
    ordered,
    per_model,
    pick,
    samples,
    tasks,
    with_average,
)
from pmp_ds.study.statistics import Estimate, difference

MATCHED = 0.02
"""Nats per token. Two models whose pretraining losses differ by no more are called matched."""


@dataclass(frozen=True)
class Contrast:
    """One side minus the other, column by column, with what each side chose."""

    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    """column, and AVERAGE over GLUE's; points, or nats for a loss."""
    chosen: Mapping[str, tuple[FineTune, FineTune]] = field(default_factory=dict)
    """task -> a run of the chosen cell of either side."""
    missing: Sequence[str] = ()
    """Tasks that a side lacks, or for which no cell was completed on both."""

    @property
    def main(self) -> Mapping[str, Estimate]:
        """What a sentence can be said of: the average of GLUE (its one column), and losses."""
        glue = [c for c in self.estimates if c != AVERAGE and not is_lm(c)]
        first = [AVERAGE] if len(glue) != 1 else glue
        losses = [c for c in ordered(self.estimates) if is_lm(c)]
        return {c: self.estimates[c] for c in (*first, *losses) if c in self.estimates}


def contrast(
    a: Sequence[FineTune],
    b: Sequence[FineTune],
    key: Callable[[FineTune], Cell] = by_method,
    *,
    primary: bool = False,
) -> Contrast:
    """The best of ``a`` minus the best of ``b`` over the cells that both have; ``key`` says what
    makes two cells the same."""
    sides: list[dict[str, Mapping[Unit, float]]] = [{}, {}]
    chosen, missing = {}, []
    for task in tasks([*a, *b]):
        own = [[run for run in side if run.task == task] for side in (a, b)]
        shared = {run.model for run in own[0]} & {run.model for run in own[1]}
        if shared:  # two ways to fine-tune the same models, some of which a side may lack
            own = [[run for run in side if run.model in shared] for side in own]
        grid = cells(own[0], key).keys() & cells(own[1], key).keys()
        picked = [best(side, grid, key, primary=primary) for side in own]
        if not all(picked):
            missing.append(task)
            continue
        chosen[task] = (picked[0][0], picked[1][0])
        for side, runs in zip(sides, picked, strict=True):
            side.update(samples(runs, primary=primary))
    if not primary:  # canonical metrics have no common scale
        sides = [with_average(side) for side in sides]
    estimates = {}
    for column in [c for c in sides[0] if c in sides[1]]:
        one, other = sides[0][column], sides[1][column]
        if not one.keys() & other.keys():  # different models, not two ways to fine-tune the same
            one, other = per_model(one), per_model(other)
        found = difference(one, other)
        if found is not None:
            estimates[column] = found.scaled(1.0 if is_lm(column) else 100.0)
    return Contrast(estimates, chosen, missing)


def gap(runs: Sequence[FineTune], *, base: str = BASE, pmp: str = PMP) -> Contrast:
    """(i) the best of BASE minus the best of PMP, both without the mask."""
    return contrast(pick(runs, arm=base), pick(runs, arm=pmp))


def matched_arm(results: Sequence[Result]) -> str | None:
    """Another arm without a mask, trained until it was about as good as PMP: the one whose loss is
    closest to PMP's, if it is MATCHED."""
    target = pretrain_losses(results, PMP).values()
    arms = {r.arm for r in results if r.kind == "pretrain" and r.settings["source"] == "none"}
    losses = {arm: fmean(pretrain_losses(results, arm).values()) for arm in sorted(arms - {BASE})}
    far = {arm: abs(loss - fmean(target)) for arm, loss in losses.items() if target}
    return min((arm for arm in far if far[arm] <= MATCHED), key=far.__getitem__, default=None)


def authorized(runs: Sequence[FineTune], *, pmp: str = PMP) -> Contrast:
    """(ii) with the mask minus without it, on the PMP model."""
    return contrast(pick(runs, arm=pmp, methods=("ticket",)), pick(runs, arm=pmp), by_choice)


def secret(runs: Sequence[FineTune], *, pmp: str = PMP) -> Contrast:
    """(iii) the true mask minus a random one of equal density, on the PMP model."""
    true, guessed = (pick(runs, arm=pmp, methods=(method,)) for method in ("ticket", "random"))
    return contrast(true, guessed, by_choice)


def pretrain_losses(results: Iterable[Result], arm: str) -> dict[object, float]:
    """Pretraining seed (the model, where seeds repeat) -> validation loss at the end."""
    own = [result for result in results if result.kind == "pretrain" and result.arm == arm]
    by_seed = {result.settings["seed"]: result.values["val_loss"] for result in own}
    if len(by_seed) == len(own):
        return by_seed
    return {result.model_digest: result.values["val_loss"] for result in own}


def capability(results: Sequence[Result]) -> Estimate | None:
    """(iv) BASE minus PMP pretraining loss: the capability tax with its sign turned."""
    return difference(pretrain_losses(results, BASE), pretrain_losses(results, PMP))


@dataclass(frozen=True)
class Headline:
    """All six."""

    gap: Contrast
    matched: tuple[str, Contrast] | None
    """(i) against another arm without a mask, whose pretraining loss is PMP's."""
    authorized: Contrast
    secret: Contrast
    capability: Estimate | None
    tokens: Mapping[str, Tokens]
    """`GLUE` and columns of losses, those measured."""
    audits: Mapping[str, Mapping[str, Any]]
    """Path -> content of an audit.json."""


def headline(
    results: Sequence[Result], runs: Sequence[FineTune], audits: Mapping[str, Mapping[str, Any]]
) -> Headline:
    groups = {"GLUE": [task for task in tasks(runs) if not is_lm(task)]}
    groups |= {task: [task] for task in tasks(runs) if is_lm(task)}
    found = {name: attacker_tokens(runs, group) for name, group in groups.items()}
    arm = matched_arm(results)
    return Headline(
        gap=gap(runs),
        matched=None if arm is None else (arm, gap(runs, base=arm)),
        authorized=authorized(runs),
        secret=secret(runs),
        capability=capability(results),
        tokens={name: tokens for name, tokens in found.items() if tokens is not None},
        audits=audits,
    )


def models_per_arm(runs: Iterable[FineTune]) -> dict[str, int]:
    """arm -> how many models (pretraining runs) were fine-tuned."""
    models = defaultdict(set)
    for run in runs:
        if not run.scratch:
            models[run.arm].add(run.model)
    return {arm: len(digests) for arm, digests in models.items()}
