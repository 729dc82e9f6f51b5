"""Every fault that the guard checks, provoked in a real run, under each policy."""

import json
import math
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pmp_ds import dist
from pmp_ds.config import MaskConfig, TrainConfig
from pmp_ds.discover.discover import random_ticket
from pmp_ds.engine.engine import Engine
from pmp_ds.log import read_metrics
from pmp_ds.model.parameters import parameter_table
from pmp_ds.run_dir import RunDir
from pmp_ds.ticket.shared import load_together
from pmp_ds.ticket.ticket import Ticket
from pmp_ds.train import pipeline
from tests.helpers import tiny
from tests.helpers.faults import seen
from tests.helpers.lives import act, checkpoints, infinite_gradient, same_end, scaled_loss, slow
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

LONG = ("--train.steps", "56", "--run.val_every", "56", "--run.checkpoint_every", "28")


def position(run: RunDir, step: int) -> Any:
    return json.loads((run.checkpoints / f"update-{step:08d}/manifest.json").read_text())


def test_nan_stops(lives, run, calm):
    one, other = lives(fault=scaled_loss, given=(6, math.nan))
    seen("nan", one.code, one.err)
    assert other.code == 1
    assert checkpoints(run) == [4]
    assert lives()[0].code == 0
    same_end(calm, run)


def test_nan_is_skipped(lives, run):
    one, _ = lives("--guard.nonfinite", "skip", fault=scaled_loss, given=(6, math.nan))
    seen("nan, skip", one.code, one.err)
    assert position(run, 12)["counters"]["optimizer_step"] == 11
    assert position(run, 12)["memory"]["skipped"] == 1
    records = [r for r in read_metrics(run.metrics) if r["step"] == 6]
    assert [(r["phase"], r["step"], r["skipped"]) for r in records] == [("train", 6, 1.0)]


def test_infinite_gradient_stops(lives, run, calm):
    one, other = lives(fault=infinite_gradient, given=(6,))
    seen("inf", one.code, one.err)
    assert other.code == 1
    assert checkpoints(run) == [4]
    assert lives()[0].code == 0
    same_end(calm, run)


@pytest.mark.parametrize("update", daily([4, 12], [12]))
def test_infinite_gradient_just_before_a_save(lives, run, update):
    """The corrupt state is not saved."""
    one, _ = lives(fault=infinite_gradient, given=(update,))
    assert (one.code, checkpoints(run)) == (1, list(range(4, update, 4)))


@pytest.mark.parametrize("stage", daily(range(4), [1]))
def test_infinite_gradient_is_skipped(lives, run, stage):
    one, _ = lives("--guard.nonfinite", "skip", fault=infinite_gradient, given=(6,), stage=stage)
    seen("inf, skip", one.code, one.err)
    assert position(run, 12)["counters"]["optimizer_step"] == 11
    assert all(math.isfinite(r.get("loss", 0.0)) for r in read_metrics(run.metrics))


@pytest.mark.parametrize(
    ("policy", "fault"), [("warn", "spike"), ("skip", "spike, skip"), ("stop", "spike, stop")]
)
def test_spike(lives, run, policy, fault):
    one, _ = lives(*LONG, "--guard.spike", policy, fault=scaled_loss, given=(54, 100.0))
    seen(fault, one.code, one.err)
    assert checkpoints(run)[-1] == (53 if policy == "stop" else 56)
    if policy != "stop":
        applied = 55 if policy == "skip" else 56
        assert position(run, 56)["counters"]["optimizer_step"] == applied


def test_spike_that_is_ignored_and_statistics_that_survive(lives, run, tmp_path):
    """The statistics of a run in two parts equal those of one, to the bit."""
    one, _ = lives(*LONG, "--guard.spike", "ignore", fault=scaled_loss, given=(54, 100.0))
    assert (one.code, one.err.count("warning")) == (0, 0)
    whole = position(run, 56)
    assert whole["memory"]["count"] == 56
    name = ("--run.name", "divided")
    stopped, _ = lives(*LONG, *name, fault=scaled_loss, given=(40, math.nan))
    assert stopped.code == 1
    one, _ = lives(*LONG, *name, "--guard.spike", "ignore", fault=scaled_loss, given=(54, 100.0))
    assert one.code == 0
    assert position(RunDir(tmp_path / "divided"), 56) == whole


def flip_frozen(engine: Engine) -> None:
    """Flip the highest bit of the frozen elements among 1,024 neighbours of this rank's share."""
    for flat in engine.shards.flats:
        if (bits := engine.optimizer.bits(flat)) is None:
            continue
        place = torch.arange(1024)
        frozen = place[(bits[place // 8] >> (place % 8).to(torch.uint8)) & 1 == 0]
        flat.data.view(-1)[frozen] *= -1
        return


def flip_mask(engine: Engine) -> None:
    bits = next(b for flat in engine.shards.flats if (b := engine.optimizer.bits(flat)) is not None)
    bits[100] ^= 4


@pytest.mark.parametrize(
    ("action", "fault", "every"),
    daily(
        [
            (a, f, n)
            for a, f in ((flip_frozen, "drift"), (flip_mask, "mask drift"))
            for n in ("1", "100")
        ],
        [(flip_frozen, "drift", "1"), (flip_mask, "mask drift", "100")],
    ),
)
def test_drift(lives, run, calm, action, fault, every):
    """Drift is found at the next check, or before a save if that comes first."""
    one, other = lives("--guard.drift_every", every, fault=act, given=(6, 1, action))
    seen(fault, one.code, one.err)
    assert f"update {6 if every == '1' else 8}:" in one.err
    assert (other.code, checkpoints(run)) == (1, [4])
    if every == "1":
        assert lives()[0].code == 0
        same_end(calm, run)


def test_drift_that_is_ignored(lives):
    assert lives("--guard.drift", "ignore", fault=act, given=(6, 1, flip_frozen))[0].code == 0


def other_ticket(rank: int) -> Any:
    """Make a rank read a ticket with one bit moved."""

    def load(folder: Path, **options: Any) -> Ticket:
        ticket = load_together(folder, **options)
        if dist.rank() == rank:
            name, bits = next(iter(ticket.mask.bits.items()))
            moved = {**ticket.mask.bits, name: bits.roll(1)}
            return replace(ticket, mask=replace(ticket.mask, bits=moved))
        return ticket

    return mock.patch.object(pipeline, "load_together", load)


def test_ranks_with_different_tickets(lives, run):
    one, other = lives(fault=other_ticket, given=(1,))
    seen("other ticket", one.code, one.err)
    assert (other.code, checkpoints(run)) == (1, [])


STRAGGLING = ("--train.steps", "44", "--run.val_every", "44", "--guard.straggler_seconds", "0.05")


@pytest.mark.nightly
def test_straggler_is_named(lives):
    """The straggler is named once, not every 20 updates."""
    one, _ = lives(*STRAGGLING, fault=slow, given=(0.1, 1))
    seen("straggler", one.code, one.err)
    assert one.err.count("times as long") == 1


@pytest.mark.nightly
def test_a_little_slower_is_noise(lives):
    """0.1 s per update is ignored, though several times the duration of the others."""
    one, _ = lives(*STRAGGLING[:4], fault=slow, given=(0.1, 1))
    assert (one.code, one.err.count("times as long")) == (0, 0)


def test_straggler_stops(lives, run):
    one, other = lives(*STRAGGLING, "--guard.straggler", "stop", fault=slow, given=(0.1, 1))
    seen("straggler, stop", one.code, one.err)
    assert (other.code, checkpoints(run)[-1]) == (75, 20)


@pytest.mark.nightly
def test_straggler_is_ignored(lives):
    one, _ = lives(*STRAGGLING, "--guard.straggler", "ignore", fault=slow, given=(0.1, 1))
    assert (one.code, one.err.count("times as long")) == (0, 0)


def jumping_clock(updates: tuple[int, int]) -> Any:
    """Move the wall clock ahead by a year at one update, then back by two years."""
    true, year = time.time, 365 * 86400.0
    offset = [0.0]

    def jump(engine: Engine, seconds: float) -> None:
        offset[0] += seconds

    def clock() -> float:
        return true() + offset[0]

    stack = ExitStack()
    stack.enter_context(mock.patch.object(time, "time", clock))
    stack.enter_context(act(updates[0], 0, jump, year))
    stack.enter_context(act(updates[1], 0, jump, -2 * year))
    return stack


def test_clock_jump(lives, run, calm):
    flags = ("--run.max_time", "3600", "--guard.hang_seconds", "600")
    one, _ = lives(*flags, fault=jumping_clock, given=((3, 7),))
    seen("clock jump", one.code, one.err)
    assert "warning" not in one.err
    same_end(calm, run)


TRAIN = TrainConfig(
    steps=6,
    warmup_steps=1,
    lr=1e-3,
    weight_decay=0.1,
    clip_norm=0.5,
    global_batch_size=8,
    micro_batch_size=2,
)


def skipping(stage: int, precision: str, with_backward: bool) -> dict[str, torch.Tensor]:
    """Do six updates without the third: dropped by the engine, or never there."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # CPU computes it, DeepSpeed denies it
    config = replace(TRAIN, precision=precision)
    engine = Engine(tiny.model(), config, tiny.ds_json(stage))
    mask = random_ticket(b"m" * 32, MaskConfig(), parameter_table(tiny.model())).mask
    engine.arm(mask)
    share = 8 // dist.world_size()
    for step in range(1, 7):
        batch = tiny.batch(step, 8)[dist.rank() * share :][:share]
        if step == 3 and not with_backward:
            continue
        engine.backward(batch * 0 if step == 3 else batch)
        if step == 3:
            engine.skip()
        else:
            engine.step(1e-3)
    found = dict(engine.parameters()) | engine.local_state()()
    found |= {"counters": torch.tensor(list(engine.counters().values()))}
    engine.close()
    return found


@pytest.mark.parametrize(
    ("stage", "precision"), daily(product(range(4), ("fp32", "bf16")), [(1, "fp32"), (3, "bf16")])
)
def test_skipped_update_leaves_no_trace(ranks2, stage, precision):
    """Weights, master, moments and counters equal those of a run that never had the update."""
    skipped = ranks2.run(skipping, stage, precision, True)
    without = ranks2.run(skipping, stage, precision, False)
    for one, other in zip(skipped, without, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name
