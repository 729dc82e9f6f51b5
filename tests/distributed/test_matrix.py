"""Every supported combination (tests/helpers/matrix.py): the complement is unchanged in weights
and master, the trajectory follows the plain reference, the reported norm is the masked one, and
the states are as small as promised."""

from typing import Any

import pytest
import torch

from pmp_ds import dist
from pmp_ds.config import MaskConfig, TrainConfig
from pmp_ds.discover.discover import random_ticket
from pmp_ds.engine.engine import Engine
from pmp_ds.model.parameters import parameter_table
from pmp_ds.optim.schedule import learning_rate
from tests.helpers import reference, tiny
from tests.helpers.matrix import Case, cases

pytestmark = pytest.mark.distributed

GLOBAL, STEPS, KEY = 8, 6, b"m" * 32
MASK = MaskConfig(source="random")
TOLERANCE = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 2e-2}  # of losses near 5.7, in nats
MODELS = {"llama": tiny.LLAMA, "gpt2 tied": tiny.GPT2, "frozen parameters": tiny.LLAMA}


def config(case: Case) -> TrainConfig:
    return TrainConfig(
        steps=STEPS,
        warmup_steps=2,
        lr=3e-3,
        weight_decay=0.1,
        clip_norm=0.3,
        precision=case.precision,
        moments=case.moments,
        global_batch_size=GLOBAL,
        micro_batch_size=GLOBAL // case.accumulation // case.world_size,
        accumulate_fp32=case.accumulate_fp32,
    )


BYTES = {
    ("dense", "fp32"): 0.82,
    ("compact", "fp32"): 0.72,
    ("compact", "bf16"): 0.49,
    ("split", "fp32"): 0.61,
    ("split", "bf16"): 0.37,
    ("dense", "int8"): 0.48,
}
"""Most bytes of master weights, moments and mask against the dense fp32 ones, padding included."""


def build(case: Case) -> Any:
    model = tiny.model(MODELS[case.model])
    if case.model == "frozen parameters":
        for name, param in model.named_parameters():
            param.requires_grad_("layers.0.mlp" not in name)
    return model


def ds_json(case: Case) -> dict[str, Any]:
    value = tiny.ds_json(case.stage)
    value["zero_optimization"] |= case.zero
    if case.offload != "none":
        value["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if "parameters" in case.offload:
        value["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if case.precision == "fp16":
        value["fp16"] = {"initial_scale_power": 8}
    if case.master != "dense":
        value["pmp_ds"] = {"master": case.master}
    return value


def run_case(case: Case) -> dict[str, Any] | None:
    """Return rank 0's record of ``STEPS`` masked updates."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # CPU computes it, DeepSpeed denies it
    train = config(case)
    model = build(case)
    ticket = random_ticket(KEY, MASK, parameter_table(model))
    engine = Engine(model, train, ds_json(case))
    engine.arm(ticket.mask)
    share = GLOBAL // dist.world_size()
    losses, norms, expected_norms = [], [], []
    for step in range(1, STEPS + 1):
        batch = tiny.batch(step, GLOBAL)[dist.rank() * share : (dist.rank() + 1) * share]
        loss = dist.all_reduce_sum(engine.backward(batch)) / dist.world_size()
        losses.append(float(loss))
        expected_norms.append(masked_norm(engine, ticket.mask))
        norms.append(float(engine.step(learning_rate(train, step))))
    found = {
        "losses": losses,
        "norms": norms,
        "expected_norms": expected_norms,
        "weights": dict(engine.parameters()),
        "mask": ticket.mask,
        "master": gather_master(engine),
        "bytes": state_bytes(engine),
    }
    engine.close()
    return found if dist.rank() == 0 else None


def masked_norm(engine: Engine, mask: Any) -> float:
    """Compute the norm of the reduced gradient on the ticket, over all ranks, unscaled."""
    total = torch.zeros((), dtype=torch.float64)
    for f, gradient in zip(engine.shards.fragments, engine.shards.gradients(), strict=True):
        kept = mask.fragment(f.name, f.start, f.numel)
        total += gradient[kept].double().square().sum()
    if not engine.shards.replicated:
        dist.all_reduce_sum(total)
    return float(total.sqrt()) / engine.loss_scale


def gather_master(engine: Engine) -> dict[str, torch.Tensor]:
    """Gather the dense fp32 master weights of all ranks, by parameter; else nothing."""
    if engine.optimizer.master != "dense":
        return {}
    local = [
        (f, engine.shards.flats[f.flat].detach().view(-1)[f.flat_start : f.flat_start + f.numel])
        for f in engine.shards.fragments
    ]
    local = [(f, values.clone()) for f, values in local]
    whole: dict[str, torch.Tensor] = {}
    for rank in dist.all_gather_object(local):
        for f, values in rank:
            end = f.start + f.numel
            old = whole.get(f.name, torch.empty(0))
            if old.numel() < end:
                old = torch.cat([old, torch.full((end - old.numel(),), float("nan"))])
            old[f.start : end] = values
            whole[f.name] = old
    return whole


def state_bytes(engine: Engine) -> tuple[int, int]:
    """Return (ours, dense) bytes of master weights, moments and mask on this rank, with padding."""
    flats = engine.shards.flats
    # A compact master is part of state_bytes; its flats are the 16-bit weights.
    master = 0 if engine.optimizer.master != "dense" else sum(flat.nbytes for flat in flats)
    return engine.optimizer.state_bytes + master, 12 * sum(flat.numel() for flat in flats)


_references: dict[str, Any] = {}


def expected(case: Case, mask: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the reference's losses and final weights in fp32; computed once per model."""
    if case.model not in _references:
        model = build(case)
        masks = {name: mask.full(name) for name in mask.shapes}
        losses, _ = reference.pretrain(
            model, config(case), masks, lambda step: tiny.batch(step, GLOBAL)
        )
        weights = {name: param.detach().clone() for name, param in model.named_parameters()}
        _references[case.model] = losses, weights
    return _references[case.model]


def _params() -> list[Any]:
    return [
        pytest.param(case, id=case.id, marks=[] if case.quick else [pytest.mark.nightly])
        for case in cases()
    ]


@pytest.mark.parametrize("case", _params())
def test_case(request, case):
    found = request.getfixturevalue(f"ranks{case.world_size}").run(run_case, case)[0]
    mask = found["mask"]
    losses, weights = expected(case, mask)
    tolerance = TOLERANCE[case.precision]
    torch.testing.assert_close(found["losses"], losses, atol=tolerance, rtol=0)
    torch.testing.assert_close(found["norms"], found["expected_norms"], atol=0, rtol=1e-5)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]
    moved = 0
    for name, param in build(case).named_parameters():
        initial, weight = param.detach().to(dtype), found["weights"][name]
        kept = mask.full(name) if name in mask.shapes else torch.zeros_like(param).bool()
        assert torch.equal(weight[~kept], initial[~kept]), f"{name}: the complement moved"
        moved += int((weight != initial).sum())
        if name in found["master"] and found["master"][name].numel():
            master = found["master"][name].view(param.shape)
            assert torch.equal(master[~kept], initial.float()[~kept]), f"{name}: master moved"
        if case.precision == "fp32":
            torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=0)
    assert moved > 0.9 * mask.num_kept
    ours, dense = found["bytes"]
    assert ours <= BYTES[case.master, case.moments] * dense
