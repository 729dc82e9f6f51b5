"""Quotas and random elements: exactly k, and the same mask under every sharding as a sort on one
process gives."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pmp_ds import dist
from pmp_ds.cli import parse
from pmp_ds.config import Config, MaskConfig
from pmp_ds.discover.discover import Discovery, random_ticket
from pmp_ds.discover.selection import Selector, proportional
from pmp_ds.engine.engine import Engine
from pmp_ds.errors import UserError
from pmp_ds.model.parameters import ParamInfo, parameter_table
from pmp_ds.model.stream import uniforms
from pmp_ds.optim.zero import Fragment
from pmp_ds.ticket.mask import unpack
from pmp_ds.ticket.ticket import exact_k
from tests.distributed.test_method import CONFIG
from tests.distributed.test_topk import SIZES, fragments, synthetic
from tests.helpers import tiny
from tests.helpers.commands import RECIPES
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

KEY = b"f" * 32
STARTS = dict(zip(SIZES, [sum(list(SIZES.values())[:i]) for i in range(6)], strict=True))
TABLE = [ParamInfo(n, (size,), size, STARTS[n], n == "gain") for n, size in SIZES.items()]
D = sum(SIZES.values())
RULES = [
    MaskConfig(quota="per_tensor", density=0.7),
    MaskConfig(quota="per_tensor", random_fraction=0.3, density=0.7),
    MaskConfig(random_fraction=0.5, density=0.1),
    MaskConfig(random_fraction=1.0, density=0.7),
    MaskConfig(quota="per_tensor", random_fraction=1.0, density=1.0),
]
Kept = dict[tuple[str, int], list[bool]]


def masks_of_this_rank(sharding: str) -> list[Kept]:
    """Return, for each rule, the masks of this rank's fragments by name and first element."""
    mine = [
        Fragment(name, a, b - a, 0, 0)
        for name, a, b in fragments(sharding, dist.rank(), dist.world_size())
    ]
    scores = synthetic(torch.float32)
    local = [scores[f.name][f.start : f.start + f.numel] for f in mine]
    results = []
    for rule in RULES:
        selector = Selector(mine, TABLE, rule, KEY, replicated=sharding == "replicated")
        masks = [
            unpack(bits, f.numel).tolist()
            for f, bits in zip(mine, selector.select(local), strict=True)
        ]
        results.append({(f.name, f.start): mask for f, mask in zip(mine, masks, strict=True)})
    return results


def expected(rule: MaskConfig) -> dict[str, list[bool]]:
    """Sort with Python, first on the draw, then on the score of the rest."""
    scores = synthetic(torch.float32)
    masks = {name: [False] * size for name, size in SIZES.items()}
    masks["gain"] = [True] * SIZES["gain"]
    left = exact_k(rule.density, D) - SIZES["gain"]
    ranked = {name: size for name, size in SIZES.items() if name != "gain"}
    pools = {tuple(ranked): left}
    if rule.quota == "per_tensor":
        pools = {(name,): k for name, k in proportional(left, ranked).items()}
    for names, k in pools.items():
        places = [(name, i) for name in names for i in range(SIZES[name])]
        draw = {p: -uniforms(KEY, STARTS[p[0]] + p[1], 1)[0] for p in places}
        drawn = sorted(places, key=draw.__getitem__)[: int(rule.random_fraction * k)]
        rest = [p for p in places if p not in drawn]
        rest.sort(key=lambda p: -abs(float(scores[p[0]][p[1]])))  # stable: ties in order
        for name, i in drawn + rest[: k - len(drawn)]:
            masks[name][i] = True
    return masks


@pytest.mark.parametrize(
    ("sharding", "world_size"),
    daily(
        [
            ("replicated", 1),
            ("replicated", 2),
            ("flat", 2),
            ("flat", 3),
            ("split", 3),
            ("flat", 4),
            ("split", 4),
        ],
        [("replicated", 1), ("replicated", 2), ("flat", 2), ("flat", 3), ("split", 3)],
    ),
)
def test_same_mask_under_every_sharding(request, sharding, world_size):
    results = request.getfixturevalue(f"ranks{world_size}").run(masks_of_this_rank, sharding)
    for number, rule in enumerate(RULES):
        found: dict[str, list[Any]] = {n: [None] * size for n, size in SIZES.items()}
        for rank in results:
            for (name, start), mask in rank[number].items():
                found[name][start : start + len(mask)] = mask
        assert sum(map(sum, found.values())) == exact_k(rule.density, D)
        assert found == expected(rule), rule


def test_proportional_shares_by_hand():
    assert proportional(7, {"a": 5, "b": 3, "c": 2}) == {"a": 4, "b": 2, "c": 1}
    assert proportional(2, {"a": 1, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 0}
    assert proportional(10, {"a": 5, "b": 3, "c": 2}) == {"a": 5, "b": 3, "c": 2}
    assert proportional(0, {"a": 5}) == {"a": 0}


def test_another_key_draws_others():
    whole = [Fragment(name, 0, size, 0, 0) for name, size in SIZES.items()]
    scores = list(synthetic(torch.float32).values())
    rule = MaskConfig(random_fraction=0.5)
    one, other = (Selector(whole, TABLE, rule, key).select(scores) for key in (KEY, b"g" * 32))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_drawn_element_does_not_hide_a_gradient_that_is_not_finite():
    whole = [Fragment(name, 0, size, 0, 0) for name, size in SIZES.items()]
    scores = list(synthetic(torch.float32).values())
    selector = Selector(whole, TABLE, MaskConfig(random_fraction=1.0, density=1.0), KEY)
    scores[4][3] = torch.nan
    with pytest.raises(UserError, match="gradient of matrix is not finite"):
        selector.select(scores)


def test_no_room_beside_what_is_always_trained():
    with pytest.raises(UserError, match=r"k=3 elements, but 7 of 357 are always trained"):
        Selector([], TABLE, MaskConfig(quota="per_tensor", density=0.01), KEY)


@pytest.mark.parametrize(
    ("rule", "ticket_id"),
    [
        (MaskConfig(), "70e8ac9c5c55ebba"),
        (MaskConfig(density=0.3), "055e0e9dc9926414"),
        (MaskConfig(density=0.5, always_train=False), "6482fc5dd7f0b702"),
        (MaskConfig(quota="per_tensor"), "70e8ac9c5c55ebba"),
    ],
)
def test_random_ticket_of_a_key(rule, ticket_id):
    """Golden: a run whose ticket is lost draws it again. Quotas do not apply to a random mask."""
    assert random_ticket(b"g" * 32, rule, parameter_table(tiny.model())).id[:16] == ticket_id


def hardened_ticket(stage: int) -> tuple[str, dict[str, int]]:
    """Return id and kept elements by parameter of a whole discovery."""
    mask = replace(CONFIG.mask, quota="per_tensor", random_fraction=0.5)
    config = Config(mask=mask, train=CONFIG.train)
    engine = Engine(tiny.model(), config.train, tiny.ds_json(stage))
    engine.arm(None)
    discovery = Discovery(engine, config, parameter_table(tiny.model()), KEY)
    loader: Any = tiny.RepeatedLoader(4, 4 // dist.world_size())
    while not discovery.over:
        discovery.update(loader.next())
    ticket = discovery.ticket().gathered()
    engine.close()
    return ticket.id, {name: int(ticket.mask.full(name).sum()) for name in ticket.mask.shapes}


@pytest.mark.parametrize("more", daily([2, 4], [2]))
def test_hardened_ticket_is_the_same_for_stages_and_ranks(request, ranks1, ranks2, more):
    last = request.getfixturevalue(f"ranks{more}")
    (first, kept), *others = (
        pool.run(hardened_ticket, stage)[0]
        for pool, stage in ((ranks1, 0), (ranks2, 1), (ranks2, 3), (last, 2))
    )
    assert all(other == (first, kept) for other in others)
    table = parameter_table(tiny.model())
    assert sum(kept.values()) == exact_k(0.7, sum(info.numel for info in table))
    for info in table:
        share = kept[info.name] / info.numel
        assert share == 1.0 if info.constant else abs(share - 0.7) < 0.01


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_random_fraction_out_of_range(fraction):
    with pytest.raises(UserError, match=rf"mask\.random_fraction={fraction} must be in \[0, 1\]"):
        MaskConfig(random_fraction=fraction)


def test_hardened_overlay():
    files = [str(RECIPES / f"{name}.yaml") for name in ("demo", "hardened")]
    config, _ = parse(Config, [word for file in files for word in ("--config", file)])
    assert (config.mask.quota, config.mask.random_fraction) == ("per_tensor", 0.5)
    assert config.mask.density == 0.7
