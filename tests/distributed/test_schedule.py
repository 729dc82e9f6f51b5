"""``train.schedule`` and ``train.optimizer`` of whole runs: a stable part that ends in a decay."""

import shutil

import pytest

from pmp_ds.log import read_metrics
from pmp_ds.run_dir import RunDir
from pmp_ds.state.run_record import export_facts
from tests.helpers.lives import checkpoints

pytestmark = pytest.mark.distributed

STABLE = (
    "--train.schedule",
    "wsd",
    "--train.optimizer",
    "lion",
    "--train.lr",
    "1e-3",
    "--run.checkpoint_every",
    "6",
    "--train.decay_steps",
)


def losses(run: RunDir) -> list[tuple[float, float]]:
    return [(r["loss"], r["lr"]) for r in read_metrics(run.metrics) if "lr" in r]


def test_decay_after_a_stable_part(lives, run, tmp_path):
    """The losses equal those of a run configured that way from its start. Learning rates already
    used do not change."""
    assert [life.code for life in lives(*STABLE, "3", "--run.name", "whole")] == [0, 0]
    whole = losses(RunDir(tmp_path / "whole"))
    assert [rate for _, rate in whole[8:]] == pytest.approx([1e-3, 7e-4, 4e-4, 1e-4])
    one, _ = lives(*STABLE, "0")
    assert one.code == 0, one
    assert "Lion, peak" in export_facts(run, 12, None)["schedule"]
    assert (checkpoints(run), losses(run)[:9]) == ([6, 12], whole[:9])
    for flags in (("3",), ("0", "--train.steps", "11")):
        one, _ = lives(*STABLE, *flags)
        assert one.code == 1
        assert f"do not continue {run.root}: with its train.steps=12" in one.err
        assert "Begin the decay after update 12" in one.err
    shutil.rmtree(run.checkpoints / "update-00000012")
    one, _ = lives(*STABLE, "3")
    assert one.code == 0, one
    assert "resuming after update 6 of 12" in one.out
    assert losses(run) == whole
    one, _ = lives(*STABLE, "3", "--train.optimizer", "adamw")
    assert (one.code, "train.optimizer: 'lion', 'adamw'" in one.err) == (1, True)


def test_a_stable_run_becomes_longer(lives, run):
    flags = ("--train.steps", "4", "--train.decay_steps", "0")
    assert lives(*STABLE[:-1], *flags)[0].code == 0
    one, _ = lives(*STABLE, "2", "--train.steps", "6")
    assert (one.code, checkpoints(run)) == (0, [4, 6])
    assert [rate for _, rate in losses(run)] == pytest.approx([5e-4, *[1e-3] * 3, 5.5e-4, 1e-4])
