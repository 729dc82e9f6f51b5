"""The arithmetic of a dry run, by hand on eighteen elements, and activations against real ones."""

from typing import Any

import numpy as np
import pytest
import torch

from pmp_ds.config import Config, MaskConfig, ModelConfig, TrainConfig
from pmp_ds.engine.memory import Meter
from pmp_ds.model.build import model_config
from pmp_ds.model.initial import Initial
from pmp_ds.model.keys import Secret
from pmp_ds.model.next_token import token_losses
from pmp_ds.train import fit, phases, wire
from pmp_ds.train.activations import Timeline, timeline
from pmp_ds.train.budget import DEFAULTS, Budget
from tests.helpers import tiny

SHAPES, KEPT = {"w": (5, 3), "b": (3,)}, 9
TIMES = Timeline(np.array([0.0, 10.0]), np.array([5.0, 1.0]), np.array([0.0, 18.0]))


def budget(stage: int, world: int = 2, mask: str = "random", **train: Any) -> Budget:
    settings = {"micro_batch_size": 1, "global_batch_size": 2 * world, **train}
    config = Config(train=TrainConfig(**settings), mask=MaskConfig(source=mask))  # type: ignore[arg-type]
    zero = {"stage": stage, "reduce_bucket_size": 4, "stage3_param_persistence_threshold": 3}
    return Budget(SHAPES, KEPT, config, {"zero_optimization": zero}, world)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "master", "moments", "mask"),
    [
        (0, 36, 36, 72, 2 * 4 * 9, 3),
        (1, 2 * 20, 36, 4 * 10, 2 * 4 * 5, 2),  # 15 + 1 and 3 + 1 elements, half of them
        (2, 2 * 20, 36, 4 * 10, 2 * 4 * 5, 2),  # both parameters reach into both partitions
        (3, 2 * 10, 2 * 10, 4 * 10, 2 * 4 * 5, 2),  # 8 and 2 elements
    ],
)
def test_two_ranks_in_bf16(stage, weights, gradients, master, moments, mask):
    found = budget(stage).states()
    assert list(found.values()) == [weights, gradients, master, moments, mask]


def test_no_mask_keeps_everything():
    assert budget(1, mask="none").states()["moments"] == 2 * 4 * 10
    assert budget(1).states(dense=True) == budget(1, mask="none").states()


@pytest.mark.parametrize(("world", "reaching"), [(1, 18), (4, 15 + 3), (16, 15 + 3)])
def test_gradients_that_stage_2_keeps_whole(world, reaching):
    """On 4 ranks the first owns 4 elements of one and 2 of the other parameter."""
    assert budget(2, world).states()["gradients"] == 2 * reaching


def test_the_peak_of_a_timeline():
    """The first operator has no finished gradient, the second has all 18 elements."""
    assert TIMES.peak(1) == 11
    assert TIMES.peak(10) == 50
    assert TIMES.peak(1, 2.0) == 10 + 1 + 36


def test_an_update_adds_up():
    """Two micro-batches: the gradients of the first are there when the second begins."""
    found = phases.update(budget(2), TIMES, 10)
    assert found["activations, logits"] == 50
    assert found["communication buckets"] == 2 * 2 * 4, "a bucket of 4 elements, and a copy"
    assert sum(found.values()) == 40 + 36 + 40 + 40 + 2 + 16 + 50
    once = phases.update(budget(1, global_batch_size=2), TIMES, 1)
    assert once["activations, logits"] == 10 + 1, "with all gradients, 47"
    assert phases.update(budget(3), None, 1)["gathered parameters"] == 36


def test_offload_moves_states_to_the_host():
    there = budget(2)
    there.zero["offload_optimizer"] = {"device": "cpu"}
    device, host = there.placed(there.states())
    assert (device["weights"], sum(device.values())) == (40, 40)
    assert host == {
        "master weights": 40,
        "moments": 40,
        "mask": 2,
        "gradients": 6 * 10,
        "weights": 2 * 10,
    }


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, [("all-reduce", 36), ("all-reduce", 8)]),
        (1, [("all-reduce", 36), ("all-gather", 40), ("all-reduce", 16)]),
        (2, [("all-reduce", 72), ("all-gather", 40), ("all-reduce", 16)]),
        # 16 elements, which stay from forward to backward; 4 persistent ones, once
        (3, [("all-gather", 2 * 2 * 16 + 2 * 4), ("reduce-scatter", 80), ("all-reduce", 24)]),
    ],
)
def test_traffic_of_two_micro_batches(stage, expected):
    found = wire.update(budget(stage))
    assert [(one.collective, one.tensor_bytes) for one in found] == expected
    assert wire.update(budget(stage, world=1)) == []


def test_a_ring():
    assert wire.Transfer("all-reduce", "", 800).sent(8) == 1400
    assert wire.Transfer("all-gather", "", 800).sent(8) == 700


def test_state_on_disk():
    """Two moments and an fp32 master for each element of the ticket; 8-bit moments in bf16."""
    assert budget(1).state_bytes() == 9 * 12
    assert budget(1, moments="int8").state_bytes() == 9 * 8
    assert budget(0, precision="fp32").state_bytes() == 9 * 8
    assert budget(1).state_bytes(dense=True) == 18 * 12 + 18 * 4 + 2 * 3


def test_copies_of_a_save():
    """Both parameters are in one file; moments and masters are copied, and the kept masters of
    these once more."""
    found = phases.host(budget(2), "save")
    assert found == {"staged weights": 36, "staged state": 40 + 40 + 4 * 4}
    start = phases.host(budget(2), "start", drawn_whole=True)
    assert start == {"theta(0), drawn": 72}


def test_defaults_are_those_of_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    made, fields = DeepSpeedZeroConfig(), DeepSpeedZeroConfig.model_fields
    theirs = {field.alias or name: getattr(made, name) for name, field in fields.items()}
    assert {name: theirs[name] for name in DEFAULTS} == DEFAULTS


def test_what_fits():
    """States of about 160 bytes at stage 2: one more sequence takes 5 bytes."""
    small = budget(2, global_batch_size=32)
    memory = fit.peak(fit.with_micro_batch(small, 4), TIMES)
    assert fit.largest(small, TIMES, round(memory / 0.9) + 1) == 4
    assert fit.largest(small, TIMES, 10) == 0
    found = fit.fits(small, {False: TIMES, True: TIMES}, 10**9)
    assert found[0, "split + bf16"] is None, "a split master needs ZeRO"
    assert found[3, "as set"] == 16
    assert fit.best(found) == (0, "as set")
    assert fit.best(dict.fromkeys(found, 0)) is None
    only = dict.fromkeys(found, 0) | {(3, "both"): 2, (2, "both"): 1}
    assert fit.best(only) == (2, "both")


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2], ids=["llama", "gpt2"])
def test_activations_are_those_of_a_real_model(config: ModelConfig):
    """A timeline from 2 and 4 sequences foretells the peak of 7 on the CPU."""
    hf = model_config(config, vocab_size=tiny.VOCAB, eos_id=2, bos_id=None, block_size=tiny.BLOCK)
    theta0, train = Initial(hf, Secret(b"k" * 32)), TrainConfig(precision="fp32")
    foretold = timeline(theta0.model(), train, tiny.BLOCK, torch.float32, "cpu")
    model, batch = tiny.model(config), tiny.batch(1, 7)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))

    def step() -> None:
        losses = token_losses(model(input_ids=batch, use_cache=False).logits, batch)
        losses.mean().backward()

    with Meter(torch.device("cpu")) as meter:
        before = meter.peak_of(lambda: [x.detach().sum() for x in model.state_dict().values()])
        peak = meter.peak_of(step) - before
    assert foretold.peak(7) == pytest.approx(peak, rel=0.02)
    assert foretold.done[-1] == sum(param.numel() for param in model.parameters())


def test_a_gpu_never_has_the_logits_in_fp32():
    hf = model_config(tiny.LLAMA, vocab_size=4001, eos_id=2, bos_id=None, block_size=tiny.BLOCK)
    theta0, train = Initial(hf, Secret(b"k" * 32)), TrainConfig()
    gpu, cpu = (
        timeline(theta0.model(), train, tiny.BLOCK, torch.bfloat16, device)
        for device in ("cuda", "cpu")
    )
    logits = 4001 * tiny.BLOCK
    assert 4 * logits <= gpu.each.max() < 8 * logits, "in bf16, and their gradient"
    assert cpu.each.max() > 10 * logits
