"""Which ZeRO stage and which micro-batch fit into the memory of a device."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pmp_ds.config import TrainConfig
from pmp_ds.engine.deepspeed_config import OWN_SECTION, merge
from pmp_ds.errors import UserError
from pmp_ds.train import phases
from pmp_ds.train.activations import Timeline
from pmp_ds.train.budget import Budget
from pmp_ds.train.micro_batch import USABLE, sizes


@dataclass(frozen=True)
class Way:
    """A change of the settings that saves memory."""

    title: str
    lean: bool = False
    """The lower bits of the master weights alone, and moments in bf16."""
    recompute: bool = False
    """All activations of a layer."""


WAYS = (
    Way("as set"),
    Way("split + bf16", lean=True),
    Way("recompute", recompute=True),
    Way("both", lean=True, recompute=True),
)
LEGEND = (
    '  split + bf16: pmp_ds.master "split" in the JSON, and train.moments bf16\n'
    "  recompute: train.activation_checkpointing full; both: the two together"
)


def changed(budget: Budget, stage: int, way: Way) -> Budget | None:
    """Return the budget at another stage in another way, or None if they do not go together."""
    ds_config: dict[str, Any] = copy.deepcopy(dict(budget.ds_config))
    ds_config.setdefault("zero_optimization", {})["stage"] = stage
    train = budget.config.train
    if way.lean:
        ds_config[OWN_SECTION] = {"master": "split"}
        train = replace(train, moments="bf16")
    if way.recompute:
        train = recomputing(train, everything=True)
    try:
        merge(ds_config, replace(train, micro_batch_size="auto"), budget.world)
    except UserError:
        return None
    return replace(budget, ds_config=ds_config, config=replace(budget.config, train=train))


def recomputing(train: TrainConfig, *, everything: bool) -> TrainConfig:
    """Return settings that recompute everything, or what these say short of that."""
    kind: Any = train.activation_checkpointing
    kind = "full" if everything else "none" if kind == "full" else kind
    return replace(train, activation_checkpointing=kind)


def with_micro_batch(budget: Budget, size: int) -> Budget:
    """Return the budget with another ``train.micro_batch_size``."""
    train = replace(budget.config.train, micro_batch_size=size)
    return replace(budget, config=replace(budget.config, train=train))


def peak(budget: Budget, timeline: Timeline | None) -> int:
    """Return the most bytes on the device in any phase."""
    size = budget.cut.micro_batch_size
    found = [phases.start(budget), phases.update(budget, timeline, size)]
    if budget.config.mask.source == "earlybird":
        found.append(phases.update(budget, timeline, size, dense=True))
    return max(sum(phase.values()) for phase in found)


def largest(budget: Budget, timeline: Timeline | None, memory: int) -> int:
    """Return the largest micro-batch that fits into 90% of ``memory`` bytes, 0 if none does."""
    share = -(-budget.config.train.global_batch_size // budget.world)
    for size in reversed(sizes(share)):
        if peak(with_micro_batch(budget, size), timeline) <= USABLE * memory:
            return size
    return 0


Fits = Mapping[tuple[int, str], int | None]
"""The largest micro-batch by stage and way; 0: none, None: the settings do not go together."""


def fits(budget: Budget, timelines: Mapping[bool, Timeline | None], memory: int) -> Fits:
    """Return what fits into ``memory`` bytes; ``timelines``: without and with recomputation."""
    found: dict[tuple[int, str], int | None] = {}
    for stage in range(4):
        for way in WAYS:
            other = changed(budget, stage, way)
            if other is None:
                found[stage, way.title] = None
            else:
                full = other.config.train.activation_checkpointing == "full"
                found[stage, way.title] = largest(other, timelines[full], memory)
    return found


def best(found: Fits) -> tuple[int, str] | None:
    """Return the smallest stage that fits, with the fewest changes, or None."""
    ways = [way.title for way in WAYS]
    return next(((s, way) for way in ways for s in range(4) if found[s, way]), None)
