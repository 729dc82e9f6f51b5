"""What the ranks send each other in an update, from shapes and settings alone.

Tensor bytes are those of the larger side of a collective on one rank. A ring sends twice as many
for an all-reduce, as many for the others, times (N - 1) / N on N ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pmp_ds.discover.selection import shares
from pmp_ds.model.parameters import ParamInfo
from pmp_ds.ticket.scores import find_score
from pmp_ds.train.budget import Budget

_HIGH, _LOW = 8 << 15, 8 << 16  # bytes of the histograms of ticket/topk.py


@dataclass(frozen=True)
class Transfer:
    """A kind of collective, in one update of one rank."""

    collective: str
    purpose: str
    tensor_bytes: int

    def sent(self, world: int) -> int:
        """Return the bytes that a rank sends in a ring of ``world`` ranks."""
        rounds = 2 if self.collective == "all-reduce" else 1
        return rounds * self.tensor_bytes * (world - 1) // world


def update(budget: Budget) -> list[Transfer]:
    """Return the transfers of an update of training; none on one rank."""
    if budget.world == 1:
        return []
    steps, stage = budget.cut.accumulation_steps, budget.stage
    found = []
    if stage == 3:
        padded = {n: -(-numel // budget.world) * budget.world for n, numel in budget.sizes.items()}
        limit = int(budget.zero["stage3_param_persistence_threshold"])
        kept = sum(padded[name] for name, numel in budget.sizes.items() if numel <= limit)
        rest = sum(padded.values()) - kept
        again = max(rest - int(budget.zero["stage3_max_reuse_distance"]) // 2, 0)
        weights = budget.element * (steps * (rest + again) + kept)
        found += [
            Transfer("all-gather", "weights, forward and backward", weights),
            Transfer("reduce-scatter", "gradients", budget.element * steps * sum(padded.values())),
        ]
    else:
        times = steps if stage == 2 else 1
        one_by_one = stage and budget.zero["reduce_scatter"]
        one_by_one = one_by_one and not budget.zero["use_multi_rank_bucket_allreduce"]
        kind = "reduce" if one_by_one else "all-reduce"
        found.append(Transfer(kind, "gradients", budget.element * times * budget.num_params))
        if stage:
            size = budget.element * sum(budget.groups)
            found.append(Transfer("all-gather", "updated weights", size))
    norm = {0: 0, 3: 8 * budget.sub_groups}.get(stage, 4 * len(budget.groups))
    return [*found, Transfer("all-reduce", "loss, stop, norm", 8 + norm)]


def selection(budget: Budget, table: Sequence[ParamInfo]) -> list[Transfer]:
    """Return what an update of discovery sends besides those of ``update``."""
    if budget.world == 1 or budget.stage == 0:
        return []
    mask = budget.config.mask
    in_fp32 = find_score(mask.score).add is not None or budget.gradient == 4
    pools = sum(kept > 0 for _, kept, _ in shares(table, mask))
    size = pools * (_HIGH + _LOW * (in_fp32 or budget.offloads("optimizer")))
    return [Transfer("all-reduce", "selection", size + 8 * budget.num_fragments + 8)]
