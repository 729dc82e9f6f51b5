"""The six numbers of a study. A positive number is what the owner of the private mask wants,
throughout.

Units: accuracy in percentage points, losses in nats per token.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from pmp_ds.finetune.method import Role, reported
from pmp_ds.results import Result
from pmp_ds.study.attacker import Tokens, attacker_tokens
from pmp_ds.study.choice import (
    Cell,
    Scores,
    best,
    by_choice,
    by_method,
    cells,
    per_model,
    samples,
    with_average,
)
from pmp_ds.study.runs import AVERAGE, BASE, PMP, FineTune, by_task, is_lm, ordered, pick
from pmp_ds.study.statistics import Estimate, difference

MATCHED = 0.02
"""Nats per token. Two models whose pretraining losses differ by no more are called matched."""


@dataclass(frozen=True)
class Contrast:
    """One side minus the other, column by column, with what each side chose."""

    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    """column, and AVERAGE over GLUE's; points, or nats for a loss."""
    chosen: Mapping[str, tuple[FineTune, FineTune]] = field(default_factory=dict)
    """task -> a run of the chosen cell of either side, where both completed a common one."""

    @property
    def glue(self) -> list[str]:
        """The columns that are averaged."""
        return [c for c in self.estimates if c != AVERAGE and not is_lm(c)]

    @property
    def main(self) -> Mapping[str, Estimate]:
        """What a sentence is written about: the average of GLUE (its one column), and losses."""
        first = self.glue if len(self.glue) == 1 else [AVERAGE]
        losses = [c for c in ordered(self.estimates) if is_lm(c)]
        return {c: self.estimates[c] for c in (*first, *losses) if c in self.estimates}


def contrast(
    a: Sequence[FineTune], b: Sequence[FineTune], key: Callable[[FineTune], Cell] = by_method
) -> Contrast:
    """Return the best of ``a`` minus the best of ``b`` over the cells that both have; ``key`` says
    what makes two cells the same."""
    found: tuple[Scores, Scores] = {}, {}
    chosen = {}
    for task in by_task([*a, *b]):
        sides = [[run for run in side if run.task == task] for side in (a, b)]
        shared = set.intersection(*({run.model for run in side} for side in sides))
        if shared:  # two ways to fine-tune the same models, some of which a side may lack
            sides = [[run for run in side if run.model in shared] for side in sides]
        grid = set.intersection(*(set(cells(side, key)) for side in sides))
        one, other = (best(side, grid, key) for side in sides)
        if one and other:
            chosen[task] = one[0], other[0]
            found[0].update(samples(one))
            found[1].update(samples(other))
    first, second = map(with_average, found)
    return Contrast({c: _minus(c, first[c], second[c]) for c in first if c in second}, chosen)


def _minus(column: str, a: Mapping[Any, float], b: Mapping[Any, float]) -> Estimate:
    if not a.keys() & b.keys():  # different models, not two ways to fine-tune the same
        a, b = per_model(a), per_model(b)
    found = difference(a, b)
    assert found is not None, "every column has a score"
    return found.scaled(1.0 if is_lm(column) else 100.0)


def gap(runs: Sequence[FineTune], base: str = BASE) -> Contrast:
    """Return (i): the best of BASE minus the best of PMP, both without the mask."""
    return contrast(pick(runs, base), pick(runs, PMP))


def authorized(runs: Sequence[FineTune]) -> Contrast:
    """Return (ii): with the mask minus without it, on the PMP model."""
    return contrast(pick(runs, PMP, reported(Role.AUTHORIZED)), pick(runs, PMP), by_choice)


def secret(runs: Sequence[FineTune]) -> Contrast:
    """Return (iii): the true mask minus a random one of equal density, on the PMP model."""
    true, guessed = (pick(runs, PMP, reported(role)) for role in (Role.AUTHORIZED, Role.GUESS))
    return contrast(true, guessed, by_choice)


def matched_arm(results: Sequence[Result]) -> str | None:
    """Return another arm without a mask, trained until it was about as good as PMP: the one whose
    loss is closest to PMP's, if it is MATCHED."""
    target = pretrain_losses(results, PMP).values()
    arms = {r.arm for r in results if r.kind == "pretrain" and r.settings["source"] == "none"}
    losses = {arm: fmean(pretrain_losses(results, arm).values()) for arm in sorted(arms - {BASE})}
    far = {arm: abs(loss - fmean(target)) for arm, loss in losses.items() if target}
    return min((arm for arm in far if far[arm] <= MATCHED), key=far.__getitem__, default=None)


def pretrain_losses(results: Iterable[Result], arm: str) -> dict[object, float]:
    """Return the validation loss at the end by pretraining seed (by model, where seeds repeat)."""
    own = [result for result in results if result.kind == "pretrain" and result.arm == arm]
    by_seed = {result.settings["seed"]: result.values["val_loss"] for result in own}
    if len(by_seed) == len(own):
        return by_seed
    return {result.model_digest: result.values["val_loss"] for result in own}


def capability(results: Sequence[Result]) -> Estimate | None:
    """Return (iv): BASE minus PMP pretraining loss, the capability tax with its sign turned."""
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

    @property
    def contrasts(self) -> Sequence[tuple[str, str, Contrast]]:
        """(i) to (iii): number, words, and what was found."""
        return (
            ("(i)", "Unauthorized gap: best BASE - best PMP, both without the mask", self.gap),
            ("(ii)", "Authorized - unauthorized, on PMP", self.authorized),
            ("(iii)", "Value of the secret: true mask - random mask, on PMP", self.secret),
        )

    @property
    def by_column(self) -> Mapping[str, Mapping[str, Estimate]]:
        """(i) to (iii), each with its short name."""
        return {f"{n} {words.split(':')[0]}": c.estimates for n, words, c in self.contrasts}


def headline(
    results: Sequence[Result], runs: Sequence[FineTune], audits: Mapping[str, Mapping[str, Any]]
) -> Headline:
    names = list(by_task(runs))
    groups = {"GLUE": [task for task in names if not is_lm(task)]}
    groups |= {task: [task] for task in names if is_lm(task)}
    tokens = {name: attacker_tokens(runs, group) for name, group in groups.items()}
    arm = matched_arm(results)
    return Headline(
        gap=gap(runs),
        matched=None if arm is None else (arm, gap(runs, arm)),
        authorized=authorized(runs),
        secret=secret(runs),
        capability=capability(results),
        tokens={name: found for name, found in tokens.items() if found is not None},
        audits=audits,
    )
