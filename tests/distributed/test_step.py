"""Our step in place of DeepSpeed's: the same bits at different stages, gradients that are not
finite, updates that are skipped, and the loss scale of fp16."""

import math
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pmp_ds import dist
from pmp_ds.config import MaskConfig, TrainConfig
from pmp_ds.discover.discover import random_ticket
from pmp_ds.engine.engine import Engine
from pmp_ds.model.parameters import parameter_table
from pmp_ds.optim.kernels.batch import Master
from tests.distributed.test_matrix import run_case
from tests.helpers import tiny
from tests.helpers.matrix import Case
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

GLOBAL, LR = 8, 3e-3
Found = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setup:
    stage: int
    precision: str
    offload: bool = False
    master: Master = "dense"
    moments: str = "fp32"

    def __str__(self) -> str:
        words = [str(self.stage), self.precision] + ["offload"] * self.offload
        words += [self.master] * (self.master != "dense")
        words += [f"{self.moments}-moments"] * (self.moments != "fp32")
        return "-".join(words)


SETUPS = (
    *(Setup(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")),
    *(Setup(stage, "fp16") for stage in (1, 2, 3)),
    *(
        Setup(stage, precision, offload=True)
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16", "fp16")
    ),
    *(
        Setup(stage, precision, master="compact")
        for stage in (1, 2, 3)
        for precision in ("bf16", "fp16")
    ),
    *(Setup(stage, "bf16", o, "split", "bf16") for stage in (1, 2, 3) for o in (False, True)),
    *(Setup(stage, "bf16", o, moments="int8") for stage in (1, 2, 3) for o in (False, True)),
)
DAILY = (
    Setup(0, "fp32"),
    Setup(1, "fp16"),
    Setup(2, "bf16", offload=True),
    Setup(2, "fp16", master="compact"),
    Setup(3, "bf16"),
    Setup(1, "bf16", master="split", moments="bf16"),
    Setup(1, "bf16", moments="int8"),
)
FP16 = [setup for setup in SETUPS if setup.precision == "fp16"]


def armed(setup: Setup, **fp16: int) -> Engine:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # CPU computes it, DeepSpeed denies it
    config = TrainConfig(
        steps=10,
        warmup_steps=0,
        lr=LR,
        weight_decay=0.1,
        clip_norm=0.3,
        precision=setup.precision,
        moments=setup.moments,
        global_batch_size=GLOBAL,
        micro_batch_size=GLOBAL // dist.world_size(),
    )
    ds_json = tiny.ds_json(setup.stage)
    if setup.offload:
        ds_json["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if setup.master != "dense":
        ds_json["pmp_ds"] = {"master": setup.master}
    if setup.precision == "fp16":
        ds_json["fp16"] = {"initial_scale_power": 8} | fp16
    engine = Engine(tiny.model(), config, ds_json)
    ticket = random_ticket(b"m" * 32, MaskConfig(source="random"), parameter_table(tiny.model()))
    engine.arm(ticket.mask)
    return engine


def backward(engine: Engine, step: int) -> None:
    engine.backward(tiny.batch(step, GLOBAL).chunk(dist.world_size())[dist.rank()])


def state(engine: Engine) -> Found:
    """This rank's weights, moments and masters."""
    return dict(engine.parameters()) | engine.local_state()()


def same(a: Found, b: Found) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def poison(engine: Engine, value: float) -> None:
    """One kept element of the last rank's gradient; of every rank's where all hold the same."""
    if not engine.shards.replicated and dist.rank() < dist.world_size() - 1:
        return
    assert engine.mask is not None
    pairs = zip(engine.shards.fragments, engine.shards.gradients(), strict=True)
    f, gradient = next(pairs)
    gradient[engine.mask.fragment(f.name, f.start, f.numel).nonzero()[3]] = value


def not_finite(setup: Setup, value: float) -> dict[str, Any]:
    """An update before, one with such a gradient, and one after it."""
    engine = armed(setup, hysteresis=1)
    backward(engine, 1)
    engine.step(LR)
    before, scale, counted = state(engine), engine.loss_scale, engine.counters()
    backward(engine, 2)
    poison(engine, value)
    norm = float(engine.step(LR))
    after = state(engine)
    found = {
        "unchanged": same(before, after),
        "norm": norm,
        "scale": engine.loss_scale / scale,
        "skipped": engine._engine.skipped_steps,
        "counted": engine.counters()["optimizer_step"] - counted["optimizer_step"],
    }
    backward(engine, 3)
    norm = float(engine.step(LR))
    last = state(engine)
    found["goes on"] = math.isfinite(norm) and not same(after, last)
    found["skipped at last"] = engine._engine.skipped_steps
    found["finite"] = all(bool(value.isfinite().all()) for value in last.values())
    engine.close()
    return found


@pytest.mark.parametrize("value", daily([math.nan, math.inf, -math.inf], [math.nan]))
@pytest.mark.parametrize("setup", daily(SETUPS, DAILY), ids=str)
def test_gradient_that_is_not_finite(ranks2, setup, value):
    """Nobody asks for it: on every rank weights, masters and moments keep their bits. In fp16 the
    loss scale is halved and DeepSpeed counts a skipped step."""
    for found in ranks2.run(not_finite, setup, value):
        assert found["unchanged"]
        assert found["goes on"]
        assert found["finite"]
        assert not math.isfinite(found["norm"])
        if setup.precision == "fp16":
            assert (found["scale"], found["skipped"], found["counted"]) == (0.5, 1, 0)
        else:  # the host does not wait to learn of it
            assert (found["scale"], found["skipped"], found["counted"]) == (1.0, 0, 1)
        assert found["skipped at last"] == found["skipped"]


def skipping(setup: Setup, value: float) -> dict[str, Any]:
    """An update that is skipped after one that overflowed, and one more."""
    engine = armed(setup, hysteresis=1)
    backward(engine, 1)
    engine.step(LR)
    if setup.precision == "fp16":
        backward(engine, 2)
        poison(engine, math.inf)
        engine.step(LR)
    before = state(engine), engine.counters(), engine._engine.skipped_steps
    backward(engine, 3)
    poison(engine, value)
    engine.skip()
    after = state(engine), engine.counters(), engine._engine.skipped_steps
    backward(engine, 4)
    engine.step(LR)
    last = state(engine)
    engine.close()
    without = armed(setup, hysteresis=1)
    backward(without, 1)
    without.step(LR)
    if setup.precision == "fp16":
        backward(without, 2)
        poison(without, math.inf)
        without.step(LR)
    backward(without, 4)
    without.step(LR)
    expected = state(without)
    without.close()
    return {
        "unchanged": same(before[0], after[0]) and before[1:] == after[1:],
        "no trace": same(last, expected),
    }


@pytest.mark.parametrize("value", daily([1.0, math.nan], [math.nan]))
@pytest.mark.parametrize("setup", daily(SETUPS, DAILY), ids=str)
def test_skip(ranks2, setup, value):
    """Gradients are dropped; nothing changes, the loss scale neither, and nothing of them is left
    in the next update."""
    assert ranks2.run(skipping, setup, value) == [{"unchanged": True, "no trace": True}] * 2


def growing(setup: Setup, window: int) -> tuple[Found, float, float]:
    """Two updates; with a window of 1 the loss scale grows in the second. The state, the norm that
    was reported, and the scale."""
    engine = armed(setup, loss_scale_window=window)
    for step in (1, 2):
        backward(engine, step)
        norm = float(engine.step(LR))
    found = state(engine), norm, engine.loss_scale
    engine.close()
    return found


@pytest.mark.parametrize(
    "setup",
    daily(FP16, [Setup(1, "fp16"), Setup(3, "fp16"), Setup(2, "fp16", offload=True)]),
    ids=str,
)
def test_update_in_which_the_loss_scale_grows(ranks2, setup):
    """Gradients are unscaled by the scale that they were computed with. DeepSpeed 0.19.8 divides by
    the grown one, which halves them."""
    grown, plain = ranks2.run(growing, setup, 1), ranks2.run(growing, setup, 1000)
    for (ours, norm, scale), (expected, expected_norm, expected_scale) in zip(
        grown, plain, strict=True
    ):
        assert scale == 2 * expected_scale
        assert norm == expected_norm
        assert same(ours, expected)


def left_behind(setup: Setup) -> list[str]:
    engine = armed(setup)
    for step in (1, 2):
        backward(engine, step)
        engine.step(LR)
    engine.evaluate(tiny.batch(3, 4))
    held = dict(engine._engine.module.named_parameters()) | {
        f"flat {i}": flat for i, flat in enumerate(engine.shards.flats)
    }
    held |= {"engine": engine._engine, "shards": engine.shards, "optimizer": engine.optimizer}
    held["DeepSpeed's optimizer"] = engine._engine.optimizer
    found = {name: weakref.ref(one) for name, one in held.items()}
    del held
    engine.close()
    return [name for name, one in found.items() if one() is not None]


@pytest.mark.parametrize("setup", daily(SETUPS, [Setup(1, "bf16"), Setup(3, "bf16")]), ids=str)
def test_nothing_is_left_after_close(ranks2, setup):
    """Without waiting for Python to look for reference cycles."""
    assert ranks2.run(left_behind, setup) == [[], []]


def case(
    stage: int, precision: str, offload: bool = False, accumulation: int = 1, **more: Any
) -> Case:
    where = "optimizer" if offload else "none"
    return Case(stage=stage, precision=precision, offload=where, accumulation=accumulation, **more)


AGREE: dict[str, tuple[Case, ...]] = (
    {
        f"{precision}, {accumulation}": tuple(
            case(stage, precision, offload, accumulation)
            for stage, offload in (
                # Stage 2 adds up micro-batches after they are reduced, the others before.
                [(1, False), (1, True), (0, False)] + [(2, False), (2, True)] * (accumulation == 1)
            )
        )
        for precision in ("fp32", "bf16")
        for accumulation in (1, 2)
    }
    | {
        f"{precision}, stage 3": (case(3, precision), case(3, precision, True))
        for precision in ("fp32", "bf16", "fp16")
    }
    | {
        f"{precision}, stage {stage}, overlap": (
            case(stage, precision, accumulation=2),
            case(stage, precision, accumulation=2, zero={"overlap_comm": True}),
        )
        for precision in ("fp32", "bf16")
        for stage in (1, 2)
    }
    | {
        # Random rounding depends on no rank's share; the blocks of 8-bit moments do.
        "bf16 moments": tuple(
            case(stage, "bf16", offload, moments="bf16")
            for stage, offload in ((1, False), (1, True), (2, False), (0, False))
        ),
        "split master, bf16 moments": tuple(
            case(stage, "bf16", offload, master="split", moments="bf16")
            for stage, offload in ((1, False), (1, True), (2, False), (2, True))
        ),
    }
)


@pytest.mark.parametrize(
    "name", daily(AGREE, ["bf16, 1", "bf16 moments", "bf16, stage 2, overlap"])
)
def test_stages_agree(ranks2, name):
    """Six updates give the same losses, norms, weights and masters to the bit, wherever the
    reduced gradients and the sums of their squares are the same."""
    first, *others = (ranks2.run(run_case, one)[0] for one in AGREE[name])
    for one, other in zip(AGREE[name][1:], others, strict=True):
        # Stage 0 adds up all squares in fp64, the others those of each rank: the last bit of a norm
        # may differ, and with it what is clipped.
        tolerance = 1e-6 if one.stage == 0 else 0.0
        for what in ("losses", "norms"):
            assert other[what] == pytest.approx(first[what], rel=tolerance, abs=0.0), one.id
        for what in ("weights", "master"):
            for parameter, expected in first[what].items():
                found = other[what][parameter].view(-1)
                if one.stage == 0 and what == "weights":
                    continue  # rounded from the masters, where there are some
                torch.testing.assert_close(
                    found, expected.view(-1), rtol=tolerance, atol=tolerance, msg=parameter
                )
