"""The ticket has the same bits under every sharding: the same scores, divided as each ZeRO stage
divides them, are compared with one sort on one process."""

import math
from itertools import product

import pytest
import torch

from pmp_ds import dist
from pmp_ds.errors import UserError
from tests.helpers.selection import select_masks
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARDINGS = ("replicated", "flat", "split", "last rank")

# name, number of elements; sizes that no number of ranks divides
SIZES = {"embed": 103, "gain": 7, "zero": 30, "tiny": 1, "matrix": 211, "tail": 5}


def synthetic(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return heavy ties across parameters and rank borders, an all-zero tensor, a few distinct
    values."""
    generator = torch.Generator().manual_seed(3)
    scores = {
        name: torch.randint(-2, 3, (size,), generator=generator).to(dtype)
        for name, size in SIZES.items()
    }
    scores["zero"].zero_()
    scores["matrix"][::7] = torch.randn(31, generator=generator).to(dtype)
    return scores


def fragments(sharding: str, rank: int, world_size: int) -> list[tuple[str, int, int]]:
    """Return (name, first element, end) of the fragments of a rank."""
    found = []
    if sharding == "replicated":  # stage 0
        found = [(name, 0, size) for name, size in SIZES.items()]
    elif sharding == "flat":  # stages 1 and 2: one flat vector, cut evenly; a group at a time
        for group in (["embed", "zero", "matrix"], ["gain", "tiny", "tail"]):
            share = math.ceil(sum(SIZES[name] for name in group) / world_size)
            offset = 0
            for name in group:
                start = max(0, rank * share - offset)
                end = min(SIZES[name], (rank + 1) * share - offset)
                if start < end:
                    found.append((name, start, end))
                offset += SIZES[name]
    elif sharding == "split":  # stage 3: every parameter over the ranks, in sub-group order
        for name, size in reversed(SIZES.items()):
            share = math.ceil(size / world_size)
            if rank * share < size:
                found.append((name, rank * share, min(size, (rank + 1) * share)))
    elif rank == world_size - 1:  # the others own nothing
        found = [(name, 0, size) for name, size in SIZES.items()]
    return found


def masks_of_this_rank(sharding: str, ks: list[int]) -> list[dict[tuple[str, int], list[bool]]]:
    """Return, per dtype and k, the masks of this rank's fragments by name and first element."""
    starts = dict(zip(SIZES, [sum(list(SIZES.values())[:i]) for i in range(6)], strict=True))
    mine = fragments(sharding, dist.rank(), dist.world_size())
    results = []
    for dtype in DTYPES:
        scores = synthetic(dtype)
        for k in ks:
            masks = select_masks(
                [scores[name][a:b] for name, a, b in mine],
                [starts[name] + a for name, a, _ in mine],
                [name for name, _, _ in mine],
                k,
                replicated=sharding == "replicated",
            )
            results.append(
                {(n, a): mask.tolist() for (n, a, _), mask in zip(mine, masks, strict=True)}
            )
    return results


def brute_force(dtype: torch.dtype, k: int) -> dict[str, list[bool]]:
    """Sort with Python on (magnitude, global index)."""
    scores = synthetic(dtype)
    ranked = [
        (-abs(value), name, i)
        for name in SIZES
        for i, value in enumerate(scores[name].double().tolist())
    ]
    order = sorted(range(len(ranked)), key=lambda position: (ranked[position][0], position))
    masks = {name: [False] * size for name, size in SIZES.items()}
    for position in order[:k]:
        _, name, i = ranked[position]
        masks[name][i] = True
    return masks


@pytest.mark.parametrize(
    ("sharding", "world_size"),
    daily(product(SHARDINGS, (1, 2, 3, 4)), [*product(SHARDINGS, (2,)), ("flat", 3)]),
)
def test_same_bits_under_every_sharding(request, sharding, world_size):
    d = sum(SIZES.values())
    ks = [7, 8, 60, 100, 150, 200, 249, 250, 251, 300, d - 1, d]
    results = request.getfixturevalue(f"ranks{world_size}").run(masks_of_this_rank, sharding, ks)
    wanted = [(dtype, k) for dtype in DTYPES for k in ks]
    for number, (dtype, k) in enumerate(wanted):
        found: dict[str, list[bool | None]] = {n: [None] * size for n, size in SIZES.items()}
        for rank in results:
            for (name, start), mask in rank[number].items():
                found[name][start : start + len(mask)] = mask
        assert found == brute_force(dtype, k), f"{dtype}, k={k}"


def error_of_this_rank(sharding: str, poisoned: tuple[int, str], value: float) -> str | None:
    scores = synthetic(torch.float32)
    if dist.rank() == poisoned[0]:
        scores[poisoned[1]][-1] = value
    mine = fragments(sharding, dist.rank(), dist.world_size())
    try:
        select_masks(
            [scores[name][a:b] for name, a, b in mine],
            list(range(len(mine))),
            [name for name, _, _ in mine],
            100,
        )
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("sharding", "rank", "name"),
    [("flat", 1, "matrix"), ("split", 0, "tiny"), ("split", 1, "embed")],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_every_rank_names_what_is_not_finite(ranks2, sharding, rank, name, value):
    messages = ranks2.run(error_of_this_rank, sharding, (rank, name), value)
    assert messages[0] is not None
    assert messages[0] == messages[1]
    assert f"the gradient of {name} is not finite (rank {rank})" in messages[0]
