"""Engines whose models are filled where they are needed equal engines of whole models, to the bit:
weights, masters, moments, losses and norms, at every stage."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pmp_ds import dist
from pmp_ds.config import MaskConfig, ModelConfig, TrainConfig
from pmp_ds.discover.discover import random_ticket
from pmp_ds.engine.engine import Engine
from pmp_ds.model.build import model_config
from pmp_ds.model.initial import Initial
from pmp_ds.model.keys import Secret
from pmp_ds.model.parameters import parameter_table, shapes
from tests.helpers import tiny
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

KEY, GLOBAL, LR = Secret(b"k" * 32), 8, 3e-3
MODELS = {"llama": tiny.LLAMA, "llama, tied": tiny.LLAMA_TIED, "gpt2, tied": tiny.GPT2}


@dataclass(frozen=True)
class Setup:
    stage: int
    precision: str
    offload: str = "none"
    model: str = "llama"

    def __str__(self) -> str:
        return "-".join((str(self.stage), self.precision, self.offload, self.model))

    @property
    def config(self) -> ModelConfig:
        return MODELS[self.model]


SETUPS = [
    *(Setup(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")),
    *(Setup(stage, "bf16", "optimizer") for stage in (1, 2, 3)),
    *(Setup(3, precision, "parameters") for precision in ("fp32", "bf16")),
    *(
        Setup(stage, "bf16", model=model)
        for stage in (1, 3)
        for model in MODELS
        if model != "llama"
    ),
]
DAILY = [
    Setup(1, "bf16", model="gpt2, tied"),
    Setup(2, "bf16", "optimizer"),
    Setup(3, "fp32"),
    Setup(3, "bf16", "parameters"),
]


def initial(config: ModelConfig) -> Initial:
    hf = model_config(config, vocab_size=tiny.VOCAB, eos_id=2, bos_id=None, block_size=tiny.BLOCK)
    return Initial(hf, KEY)


def trained(setup: Setup, empty: bool) -> dict[str, Any] | None:
    """Three masked updates from theta(0), whole or filled in place."""
    theta0 = initial(setup.config)
    ds_json = tiny.ds_json(setup.stage)
    zero = ds_json["zero_optimization"]
    if setup.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if setup.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    config = TrainConfig(
        precision=setup.precision,
        weight_decay=0.1,
        clip_norm=0.3,
        global_batch_size=GLOBAL,
        micro_batch_size=GLOBAL // dist.world_size(),
    )
    if empty:
        model = theta0.model()
        assert all(param.is_meta for param in model.parameters())
        engine = Engine(model, config, ds_json, fill=theta0.read)
    else:
        engine = Engine(tiny.model(setup.config, KEY), config, ds_json)
    module = engine._engine.module
    attributes = {name: sorted(vars(param)) for name, param in module.named_parameters()}
    partitions = {
        name: (sorted(vars(p.ds_tensor)), p.ds_tensor.shape, str(p.ds_tensor.device), p.ds_persist)
        for name, p in module.named_parameters()
        if hasattr(p, "ds_tensor")
    }
    first = dict(engine.parameters())
    ticket = random_ticket(b"m" * 32, MaskConfig(source="random"), theta0.table)
    engine.arm(ticket.mask)
    numbers = []
    for step in (1, 2, 3):
        loss = engine.backward(tiny.batch(step, GLOBAL).chunk(dist.world_size())[dist.rank()])
        numbers.append((float(loss), float(engine.step(LR))))
    found = {
        "attributes": attributes,
        "partitions": partitions,
        "first": first,
        "last": dict(engine.parameters()),
        "state": engine.local_state()(),
        "shapes": shapes(engine._engine.module),
        "num_params": engine.num_params,
        "numbers": numbers,
        "buffers": {n: b.cpu().clone() for n, b in engine._engine.module.named_buffers()},
    }
    engine.close()
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@pytest.mark.parametrize("setup", daily(SETUPS, DAILY), ids=str)
def test_filled_in_place_to_the_bit(ranks2, setup):
    ours, whole = ranks2.run(trained, setup, True), ranks2.run(trained, setup, False)
    for mine, expected in zip(ours, whole, strict=True):
        for what, value in expected.items():
            assert equal(mine[what], value), what
    assert not equal(ours[0]["first"], ours[0]["last"])


def odd() -> list[bool]:
    """Whether each parameter has the initial values."""
    theta0 = initial(tiny.LLAMA)
    config = TrainConfig(precision="fp32", global_batch_size=GLOBAL, micro_batch_size=1)
    engine = Engine(theta0.model(), config, tiny.ds_json(3), fill=theta0.read)
    whole = dict(engine.parameters())
    engine.close()
    if dist.rank():
        return []
    expected = tiny.model(key=KEY).named_parameters()
    return [torch.equal(whole[name], param.detach()) for name, param in expected]


def test_partitions_of_any_size(ranks3):
    """The sizes of a tiny model's parameters are not divisible by 3."""
    assert all(ranks3.run(odd)[0])


def test_the_table_of_recipes_is_that_of_the_weights():
    for config in MODELS.values():
        assert initial(config).table == parameter_table(tiny.model(config, KEY))
