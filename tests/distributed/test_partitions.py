"""Tensors of any sizes on any number of ranks: the fragments of all ranks are every element exactly
once, at every stage, and what lies there is that element."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import deepspeed
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from pmp_ds import dist
from pmp_ds.optim.zero import Fragment, shards_of
from tests.helpers import tiny
from tests.helpers.examples import examples
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

MOST, STAGES = 40, range(4)
Sizes = list[tuple[int, bool]]  # number of elements, and whether it is in the second group
Held = list[tuple[Fragment, list[float]]]


class Sum(torch.nn.Module):
    """A loss whose gradient is the element's own value."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        starts = torch.tensor([0, *(numel for numel, _ in sizes)]).cumsum(0)
        self.parts = torch.nn.ParameterList(
            torch.arange(float(start), float(start + numel))
            for start, (numel, _) in zip(starts, sizes, strict=False)
        )

    def forward(self) -> torch.Tensor:
        total: torch.Tensor = sum(part.square().sum() / 2 for part in self.parts)
        return total


def held(sizes: Sizes, stage: int) -> tuple[Held, Held, bool]:
    """Return this rank's fragments with what lies there in the flats and in the gradients."""
    model = Sum(sizes)
    pairs = list(zip(model.parts, sizes, strict=True))
    groups = [[part for part, (_, second) in pairs if second is which] for which in (False, True)]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([{"params": group} for group in groups if group], lr=0.0),
        config={
            "train_batch_size": dist.world_size(),
            "zero_allow_untested_optimizer": True,
            **tiny.ds_json(stage),
        },
        dist_init_required=False,
    )
    shards = shards_of(engine)
    weights = [(f, f.of(shards.flats[f.flat].detach()).tolist()) for f in shards.fragments]
    engine.backward(engine())
    found = shards.gradients()
    gradients = [(f, g.tolist()) for f, g in zip(shards.fragments, found, strict=True)]
    replicated = shards.replicated
    del found
    engine.destroy()
    shards.free()
    return weights, gradients, replicated


def every(sizes: Sizes) -> list[tuple[Held, Held, bool]]:
    return [held(sizes, stage) for stage in STAGES]


def check(ranks: Sequence[list[tuple[Held, Held, bool]]], sizes: Sizes) -> None:
    starts = [sum(numel for numel, _ in sizes[:i]) for i in range(len(sizes))]
    wanted = Counter((f"parts.{i}", n) for i, (numel, _) in enumerate(sizes) for n in range(numel))
    for stage in STAGES:
        found: Counter[tuple[str, int]] = Counter()
        for rank in ranks:
            *both, replicated = rank[stage]
            for held_here in both:
                for f, values in held_here:
                    first = starts[int(f.name.removeprefix("parts."))] + f.start
                    assert values == [float(first + i) for i in range(f.numel)], (stage, f)
            mine = Counter((f.name, f.start + i) for f, _ in both[0] for i in range(f.numel))
            assert replicated == (stage == 0)
            if replicated:
                assert mine == wanted
            found += mine
        assert found == (wanted if stage else Counter(dict.fromkeys(wanted, len(ranks)))), stage


SIZES = st.lists(st.tuples(st.integers(1, MOST), st.booleans()), min_size=1, max_size=6)


@pytest.mark.parametrize("world_size", daily([2, 3, 4], [3]))
def test_every_element_once(request: Any, world_size: int) -> None:
    pool = request.getfixturevalue(f"ranks{world_size}")

    @examples(5, suppress_health_check=list(HealthCheck))
    @given(SIZES)
    def run(sizes: Sizes) -> None:
        check(pool.run(every, sizes), sizes)

    run()


def test_ranks_that_own_nothing(ranks4: Any) -> None:
    sizes = [(3, False), (1, True)]
    ranks = ranks4.run(every, sizes)
    check(ranks, sizes)
    assert all(any(not rank[stage][0] for rank in ranks) for stage in (1, 2, 3))
