"""`train.micro_batch_size: auto` in whole runs: what it chooses, that all ranks agree, and that it
changes nothing else."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pmp_ds import dist
from pmp_ds.cli import parse
from pmp_ds.config import Config, TrainConfig
from pmp_ds.data.mixed_store import open_data
from pmp_ds.engine.deepspeed_config import read_json
from pmp_ds.engine.engine import Engine
from pmp_ds.engine.memory import Meter
from pmp_ds.run_dir import RunDir
from pmp_ds.state.run_record import load_config
from pmp_ds.train import micro_batch
from pmp_ds.train.job import open_job
from tests.distributed.test_elastic import stop_in_training
from tests.helpers import tiny
from tests.helpers.lives import SETTINGS, all_of, checkpoints, same_end
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

AUTO = ("--train.micro_batch_size", "auto")
SAID = re.compile(
    r"micro-batch (\d+): states ([\d.]+) MB \+ (\d+) x ([\d.]+) MB activations (<=|>) 90% of "
    r"([\d.]+) [MG]B free(.*)\n  (.*)\n"
)


@contextlib.contextmanager
def free_memory(of_last_rank: int) -> Iterator[None]:
    """Let the last rank see that many bytes of free memory, the others a terabyte."""
    last = dist.rank() == dist.world_size() - 1
    free = of_last_rank if last else 10**12
    with mock.patch.object(micro_batch, "free_bytes", return_value=free):
        yield


def test_a_whole_share_changes_no_bit(lives, run, calm):
    """4 sequences at once, as in the settings of the calm run."""
    one, _ = lives(*AUTO)
    assert one.code == 0, one.err
    assert "8 sequences, as many at once as fit (measured below), x 32 tokens" in one.out
    (found,) = SAID.findall(one.out)
    assert found[0] == found[2] == "4"
    assert (found[4], found[6]) == ("<=", "")
    assert found[7] == "4 sequences x 1 accumulation step x 2 ranks = 8 sequences"
    same_end(calm, run)
    assert load_config(run).train.micro_batch_size == "auto"


@pytest.mark.parametrize("stage", daily([0, 1, 2, 3], [2]))
def test_little_memory(lives, tmp_path, stage):
    """Ranks with different memory agree on what fits the smaller one; a resumed run takes the
    same number, whatever is free then."""
    one, _ = lives(*AUTO, "--run.name", "plenty", "--train.steps", "2", stage=stage)
    (found,) = SAID.findall(one.out)
    states, each = float(found[1]), float(found[3])
    assert each > 0.1
    free = 2 * int((states + 2.5 * each) * 1e6 / 0.9)  # of the host, for two ranks
    given = [(free_memory, (free,)), (stop_in_training, (6,))]
    one, _ = lives(*AUTO, fault=all_of, given=given, stage=stage)
    assert one.code == 75, one.err
    (found,) = SAID.findall(one.out)
    assert (found[0], found[4]) == ("2", "<=")
    assert float(found[5]) == pytest.approx(free / 2e6, abs=0.01)
    assert found[7] == "2 sequences x 2 accumulation steps x 2 ranks = 8 sequences"
    again, _ = lives(*AUTO, stage=stage)
    assert again.code == 0, again.err
    assert "micro-batch 2: as before on 2 ranks of CPU with " in again.out
    assert not SAID.search(again.out)
    fixed, _ = lives("--train.micro_batch_size", "2", "--run.name", "fixed", stage=stage)
    assert fixed.code == 0, fixed.err
    assert "micro-batch 2:" not in fixed.out
    assert checkpoints(RunDir(tmp_path / "fixed"))[-1] == 12
    same_end(RunDir(tmp_path / "fixed"), RunDir(tmp_path / "main"))
    (size,) = json.loads((tmp_path / "main" / "micro_batch.json").read_text()).values()
    assert size == 2


def test_memory_for_no_sequence(lives):
    one, _ = lives(*AUTO, "--train.steps", "2", fault=free_memory, given=(10**6,))
    assert one.code == 0, one.err
    (found,) = SAID.findall(one.out)
    assert (found[0], found[4], found[6]) == ("1", ">", ": memory may run out")


def peaks(stage: int) -> tuple[list[int], int]:
    """Return the peaks of trials with 1, 2 and 8 sequences, and that of a real update with 8."""
    train = TrainConfig(micro_batch_size=1, global_batch_size=2, precision="bf16")
    with Meter(dist.device()) as meter:
        engine = Engine(tiny.model(), train, tiny.ds_json(stage))
        engine.arm(None)
        found = [meter.peak_of(partial(engine.trial, tiny.batch(1, 2 * n))) for n in (1, 2, 8)]
        engine.close()
    train = replace(train, micro_batch_size=8, global_batch_size=16)
    with Meter(dist.device()) as meter:
        engine = Engine(tiny.model(), train, tiny.ds_json(stage))
        engine.arm(None)
        real = meter.peak_of(partial(_update, engine, tiny.batch(1, 16)))
        engine.close()
    return found, real


def _update(engine: Engine, rows: torch.Tensor) -> None:
    engine.backward(rows)
    engine.step(0.1)


@pytest.mark.parametrize("stage", [1, 3])
def test_two_trials_foretell_a_real_update(ranks1, stage):
    (((one, two, eight), real),) = ranks1.run(peaks, stage)
    expected = one + 7 * (two - one)
    assert eight == pytest.approx(expected, rel=0.02)
    assert real == pytest.approx(expected, rel=0.02)


def measured(work: str, root: str, *flags: str) -> dict[str, Any]:
    """Return what the trials find, and whether they leave torch's generator as it was."""
    folder = Path(work)
    recipe = ("--config", str(folder / "tiny.yaml"), "--data.store", str(folder / "store"))
    config, _ = parse(Config, [*recipe, *SETTINGS, *AUTO, "--init.seed", "1", *flags])
    run = RunDir(Path(root))
    run.create()
    job = open_job(config, read_json(folder / "zero1.json"), open_data(config.data.store), run)
    state = torch.get_rng_state()
    room = micro_batch._measure(job)
    return {"room": room, "same": torch.equal(torch.get_rng_state(), state)}


def test_what_a_run_needs(ranks1, work, tmp_path):
    """Discovery keeps 4 bytes per element more than a run that needs none; layers that are
    computed again keep less; the generator is as before."""
    names: list[tuple[str, ...]] = [
        (),
        ("--mask.source", "earlybird"),
        ("--train.activation_checkpointing", "full"),
    ]
    found = []
    for i, flags in enumerate(names):
        (one,) = ranks1.run(measured, str(work), str(tmp_path / str(i)), *flags)
        assert one["same"]
        found.append(one["room"])
    plain, discovery, again = found
    d = 2 * 400 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48) + 5 * 32
    assert discovery.states - plain.states == pytest.approx(4 * d, rel=0.05)
    assert discovery.each == plain.each
    assert again.each < 0.9 * plain.each
    assert 20 * d < plain.states < 26 * d, "weights, gradients, two moments, and buffers, in fp32"
