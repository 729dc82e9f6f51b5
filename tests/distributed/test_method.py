"""Discovery, rewind and masked pretraining under every ZeRO stage and rank count, compared with
the plain PyTorch reference, and bit for bit with one another if the gradients are equal."""

from dataclasses import replace
from itertools import product
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

MICRO, REPEATS = 4, 4  # a global batch is MICRO blocks, REPEATS times: any of 1, 2, 4 ranks
CONFIG = Config(
    mask=MaskConfig(iou_threshold=0.95, patience=3, max_steps=40),
    train=TrainConfig(
        steps=20,
        warmup_steps=4,
        lr=3e-3,
        weight_decay=0.1,
        clip_norm=0.5,
        precision="fp32",
        global_batch_size=MICRO * REPEATS,
        micro_batch_size=MICRO,
    ),
)


def run_method(stage: int, precision: str) -> dict[str, Any] | None:
    """Run the whole method on the ranks of this process group; return rank 0's results."""
    config = replace(CONFIG, train=replace(CONFIG.train, precision=precision))
    ds_json, repeats = tiny.ds_json(stage), REPEATS // dist.world_size()
    table = parameter_table(tiny.model())
    trace: list[float | None] = []

    engine = Engine(tiny.model(), config.train, ds_json)
    loader: Any = tiny.RepeatedLoader(MICRO, repeats)
    engine.arm(None)
    discovery = Discovery(engine, config, table)
    while not discovery.over:
        trace.append(discovery.update(loader.next())[1])
    ticket = discovery.ticket().gathered()
    engine.close()

    engine = Engine(tiny.model(), config.train, ds_json)
    engine.arm(ticket.mask)
    loader = tiny.RepeatedLoader(MICRO, repeats)
    losses, norms = [], []
    for step in range(1, config.train.steps + 1):
        losses.append(float(engine.backward(loader.next())))
        norms.append(float(engine.step(learning_rate(config.train, step))))
    weights = dict(engine.parameters())
    engine.close()
    if dist.rank() != 0:
        return None
    return {
        "id": ticket.id,
        "step": ticket.step,
        "trace": trace[1:],
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "k": ticket.mask.num_kept,
        "masks": {name: ticket.mask.full(name) for name in ticket.mask.shapes},
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Return the reference's ticket, trajectory and weights for the `mean` score in fp32."""
    model = tiny.model()
    k = exact_k(CONFIG.mask.density, num_params(parameter_table(model)))
    batch = lambda step: tiny.batch(step, MICRO)  # noqa: E731
    masks, step, trace = reference.discover(model, CONFIG.train, CONFIG.mask, batch, k)
    model = tiny.model()  # rewind
    losses, norms = reference.pretrain(model, CONFIG.train, masks, batch)
    weights = {name: param.detach() for name, param in model.named_parameters()}
    return {
        "k": k,
        "masks": masks,
        "step": step,
        "trace": trace,
        "losses": losses,
        "norms": norms,
        "weights": weights,
    }


_tickets: dict[tuple[int, int], str] = {}


@pytest.mark.parametrize(
    ("stage", "world_size"),
    daily(product(range(4), (1, 2, 4)), [(0, 1), (1, 2), (2, 2), (3, 2)]),
)
def test_fp32_equals_reference(request, expected, stage, world_size):
    pool = request.getfixturevalue(f"ranks{world_size}")
    found = pool.run(run_method, stage, "fp32")[0]
    assert found["k"] == expected["k"]
    assert found["step"] == expected["step"]
    torch.testing.assert_close(found["trace"], expected["trace"], atol=1e-3, rtol=0)
    torch.testing.assert_close(found["losses"], expected["losses"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], atol=1e-5, rtol=1e-4)
    theta0 = dict(tiny.model().named_parameters())
    for name, weight in found["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], atol=1e-5, rtol=0)
        frozen = ~found["masks"][name]
        assert torch.equal(weight[frozen], theta0[name][frozen])
    _tickets[world_size, stage] = found["id"]
    assert all(torch.equal(found["masks"][n], mask) for n, mask in expected["masks"].items())
    assert set(_tickets.values()) == {found["id"]}, "tickets differ between shardings"


@pytest.mark.parametrize(("stage", "world_size"), daily(product(range(4), (1, 2)), [(3, 2)]))
def test_bf16_keeps_complement(request, expected, stage, world_size):
    pool = request.getfixturevalue(f"ranks{world_size}")
    found = pool.run(run_method, stage, "bf16")[0]
    theta0 = dict(tiny.model().named_parameters())
    moved = 0
    for name, weight in found["weights"].items():
        kept, initial = found["masks"][name], theta0[name].bfloat16()
        assert torch.equal(weight[~kept], initial[~kept])
        moved += int((weight[kept] != initial[kept]).sum())
    assert moved > 0.5 * found["k"]
    torch.testing.assert_close(found["losses"], expected["losses"], atol=0.02, rtol=0)
