"""(v) of the six numbers: how many tokens an attacker of PMP needs to be where BASE's ends."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pmp_ds.study.choice import best
from pmp_ds.study.runs import BASE, PMP, FineTune, by_task, is_lm, pick
from pmp_ds.study.statistics import Estimate, level


@dataclass(frozen=True)
class Tokens:
    """(v) for a group of tasks: tokens until a fine-tune reaches what BASE's best ends at."""

    more: Estimate | None
    """Natural logarithm of PMP's tokens over BASE's, over the seeds that got there."""
    pairs: int
    """Tasks times seeds that were tried."""
    never: int
    """Those in which PMP never got there."""
    most: float
    """Longest of PMP's fine-tunes, tokens."""


def attacker_tokens(runs: Sequence[FineTune], names: Iterable[str]) -> Tokens | None:
    """Return (v), or None without curves of both. For each task and seed the target is where BASE's
    best fine-tune ends; both arms may use whichever setting reaches it first."""
    ratios: dict[object, list[float]] = defaultdict(list)
    pairs, most = 0, 0.0
    tasks = by_task(run for run in runs if run.curve)
    for task in names:
        base, pmp = (pick(tasks.get(task, []), arm) for arm in (BASE, PMP))
        for run in best(base):
            own = [r for r in pmp if r.seed == run.seed]
            first = [_first(side, run, lower=is_lm(task)) for side in (base, own)]
            if not own or first[0] <= 0.0:  # where BASE starts at its end there is nothing to reach
                continue
            pairs += 1
            most = max(most, *(r.curve[-1][0] for r in own))
            if math.isfinite(first[1]):
                ratios[run.seed].append(math.log(max(first[1], 1.0) / max(first[0], 1.0)))
    if not pairs:
        return None
    reached = sum(map(len, ratios.values()))
    means = [sum(values) / len(values) for values in ratios.values()]
    return Tokens(level(means) if means else None, pairs, pairs - reached, most)


def _first(group: Sequence[FineTune], target: FineTune, *, lower: bool) -> float:
    """Fewest tokens after which one of ``group``, with the target's seed, is where it ends."""
    end = target.curve[-1][1]
    found = [crossing(r.curve, end, lower=lower) for r in group if r.seed == target.seed]
    return min(found, default=math.inf)


def crossing(curve: Sequence[tuple[float, float]], target: float, *, lower: bool) -> float:
    """Return where the curve first is at ``target``, interpolated; infinite when it never is."""
    sign = -1.0 if lower else 1.0
    before: tuple[float, float] | None = None
    for place, value in curve:
        if sign * value >= sign * target:
            if before is None or before[1] == value:
                return place
            share = (target - before[1]) / (value - before[1])
            return before[0] + share * (place - before[0])
        before = place, value
    return math.inf
