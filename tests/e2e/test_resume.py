"""SIGKILL at the worst moments; the same command goes on."""

import shutil
from pathlib import Path

import pytest

from pmp_ds.log import read_metrics
from pmp_ds.run_dir import RunDir
from pmp_ds.ticket.ticket import has_ticket, load_ticket
from tests.e2e.conftest import MainRun
from tests.helpers.commands import DS_CONFIGS, kill_when, ok, run, start
from tests.helpers.workplace import STEPS

pytestmark = pytest.mark.e2e

TIMINGS = ("tokens_per_second", "loader_share")


def steps(run: RunDir, phase: str) -> list[int]:
    return [r["step"] for r in read_metrics(run.metrics) if r["phase"] == phase and "loss" in r]


def test_killed_in_training(main_run: MainRun, work: Path):
    """Bit for bit what the run that nobody disturbed came to."""
    killed = RunDir(work / "runs" / "killed")
    killed.create()  # with the other run's key: the ticket, found again, is then the same
    shutil.copy(main_run.run.init / "key", killed.init / "key")
    command = (
        "pretrain.py", "--config", "tiny.yaml", "--run.name", "killed", "--run.checkpoint_every",
        "4", "--deepspeed-config", DS_CONFIGS / "zero1.json",
    )  # fmt: skip
    kill_when(
        start(*command, cwd=work, ranks=2),
        lambda: steps(killed, "train")[-1:] >= [6] and steps(killed, "train")[-1] % 4 == 2,
    )
    reached = steps(killed, "train")[-1]
    assert 6 <= reached < STEPS
    assert load_ticket(killed.ticket).id == load_ticket(main_run.run.ticket).id

    done = ok(run(*command, cwd=work, ranks=2))
    step = int(done.stdout.split("resuming after update ")[1].split()[0])
    assert 4 <= step <= reached
    assert step % 4 == 0
    for name in ("weights/model.safetensors", "state/rank-00000.safetensors",
                 "state/rank-00001.safetensors"):  # fmt: skip
        last = Path(f"update-{STEPS:08d}") / name
        assert (killed.checkpoints / last).read_bytes() == (
            main_run.run.checkpoints / last
        ).read_bytes()
    records = [
        [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(path)]
        for path in (killed.metrics, main_run.run.metrics)
    ]
    assert records[0] == records[1]


def test_killed_in_discovery(work: Path):
    """Discovery starts again, with the same initial weights; an unstable ticket is reported."""
    killed = RunDir(work / "runs" / "early")
    command = (
        "pretrain.py", "--config", "tiny.yaml", "--run.name", "early", "--mask.iou_threshold",
        "1.0", "--mask.on_unstable", "last", "--mask.max_steps", "60", "--train.steps", "4",
        "--deepspeed-config", "zero1.json",
    )  # fmt: skip
    kill_when(start(*command, cwd=work), lambda: len(steps(killed, "discover")) >= 3)
    assert not has_ticket(killed.ticket)
    assert not list(killed.checkpoints.iterdir())
    key = (killed.init / "key").read_bytes()
    first = read_metrics(killed.metrics)[:3]

    done = ok(run(*command, cwd=work))
    assert "resuming" not in done.stdout
    assert (killed.init / "key").read_bytes() == key
    assert steps(killed, "discover") == list(range(1, 61))
    assert steps(killed, "train") == [1, 2, 3, 4]
    assert read_metrics(killed.metrics)[:3] == first
    report = ok(run("report.py", "--run", "runs/early", cwd=work)).stdout
    assert "after update 60 of discovery, NOT STABLE" in report
    assert "none yet: python launcher/export.py --run runs/early" in report
