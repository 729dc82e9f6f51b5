"""Batches that do not divide into ranks and micro-batches, under every ZeRO stage: discovery and
masked pretraining equal the plain PyTorch reference on whole batches."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pmp_ds import dist
from pmp_ds.config import Config, MaskConfig, TrainConfig
from pmp_ds.discover.discover import Discovery
from pmp_ds.engine.engine import Engine
from pmp_ds.model.parameters import num_params, parameter_table
from pmp_ds.optim.schedule import learning_rate
from pmp_ds.ticket.ticket import exact_k
from tests.helpers import reference, tiny
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

BATCH = 8
SHARES = {1: [8], 2: [4, 4], 3: [3, 3, 2]}
CONFIG = Config(
    mask=MaskConfig(iou_threshold=0.95, patience=3, max_steps=40),
    train=TrainConfig(
        steps=20,
        warmup_steps=4,
        lr=3e-3,
        weight_decay=0.1,
        clip_norm=0.5,
        precision="fp32",
        global_batch_size=BATCH,
    ),
)


def share(step: int) -> torch.Tensor:
    """Return this rank's blocks of an update."""
    return tiny.batch(step, BATCH).split(SHARES[dist.world_size()])[dist.rank()]


def run_method(stage: int, precision: str, micro_batch_size: int) -> dict[str, Any] | None:
    """Run the whole method on the ranks of this process group; return rank 0's results."""
    train = replace(CONFIG.train, precision=precision, micro_batch_size=micro_batch_size)
    table, config = parameter_table(tiny.model()), replace(CONFIG, train=train)
    engine = Engine(tiny.model(), train, tiny.ds_json(stage))
    engine.arm(None)
    discovery, warm_up = Discovery(engine, config, table), []
    while not discovery.over:
        loss, _ = discovery.update(share(discovery.step + 1))
        warm_up.append(float(dist.all_reduce_sum(loss)) / dist.world_size())
    ticket = discovery.ticket().gathered()
    engine.close()

    engine = Engine(tiny.model(), train, tiny.ds_json(stage))
    engine.arm(ticket.mask)
    losses, norms = [], []
    for step in range(1, train.steps + 1):
        loss = dist.all_reduce_sum(engine.backward(share(step))) / dist.world_size()
        losses.append(float(loss))
        norms.append(float(engine.step(learning_rate(train, step))))
    weights = dict(engine.parameters())
    engine.close()
    if dist.rank() != 0:
        return None
    return {
        "step": ticket.step,
        "warm_up": warm_up,
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "masks": {n: ticket.mask.full(n) for n in ticket.mask.shapes},
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Return the reference's ticket, losses, norms and weights, for whole batches in fp32."""
    model = tiny.model()
    k = exact_k(CONFIG.mask.density, num_params(parameter_table(model)))
    batch = lambda step: tiny.batch(step, BATCH)  # noqa: E731
    masks, step, _ = reference.discover(model, CONFIG.train, CONFIG.mask, batch, k)
    dense, _ = reference.pretrain(tiny.model(), CONFIG.train, None, batch)
    model = tiny.model()  # rewind
    losses, norms = reference.pretrain(model, CONFIG.train, masks, batch)
    weights = {name: param.detach() for name, param in model.named_parameters()}
    return {
        "masks": masks,
        "step": step,
        "warm_up": dense[:step],
        "losses": losses,
        "norms": norms,
        "weights": weights,
    }


# (ranks, largest micro-batch, ZeRO stage). Shares of 3, 3 and 2 sequences in two micro-batches of 2
# rows, or in one of 3; and a batch of 8 on one rank in three micro-batches of 3 rows.
CUTS = [(3, 2, 0), (3, 2, 1), (3, 2, 2), (3, 2, 3), (3, 8, 0), (3, 8, 3), (1, 3, 2)]


@pytest.mark.parametrize(
    ("world_size", "micro", "stage"), daily(CUTS, [(3, 2, 1), (3, 8, 3), (1, 3, 2)])
)
def test_fp32_equals_reference(request, expected, world_size, micro, stage):
    pool = request.getfixturevalue(f"ranks{world_size}")
    found = pool.run(run_method, stage, "fp32", micro)[0]
    assert found["step"] == expected["step"]
    torch.testing.assert_close(found["warm_up"], expected["warm_up"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["losses"], expected["losses"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], atol=1e-5, rtol=1e-4)
    theta0 = dict(tiny.model().named_parameters())
    for name, weight in found["weights"].items():
        assert torch.equal(found["masks"][name], expected["masks"][name]), name
        torch.testing.assert_close(weight, expected["weights"][name], atol=1e-5, rtol=0)
        frozen = ~found["masks"][name]
        assert torch.equal(weight[frozen], theta0[name][frozen])


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_keeps_complement(ranks3, expected, stage):
    found = ranks3.run(run_method, stage, "bf16", 2)[0]
    theta0 = dict(tiny.model().named_parameters())
    for name, weight in found["weights"].items():
        frozen = ~found["masks"][name]
        assert torch.equal(weight[frozen], theta0[name].bfloat16()[frozen])
    torch.testing.assert_close(found["losses"], expected["losses"], atol=0.02, rtol=0)
