"""What pmp-ds 0.1.0 wrote goes on with this version: runs, stores, tickets, sealed copies.

tests/old/0.1.0.tar.xz was written by commit 3f846c28, the last of 0.1.0, on one CPU rank in bf16 at
ZeRO 1: a store of 60 invented documents; `runs/old`, killed while it wrote the record of update 15,
after the checkpoint of update 12; `runs/early`, with the same key, killed in discovery after update
2; a sealed copy and its key. In `expected/` are metrics and weights of `runs/old` without the kill.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pmp_ds.log import read_metrics, read_starts
from pmp_ds.run_dir import RunDir
from pmp_ds.state import plain_weights
from pmp_ds.ticket.ticket import load_ticket
from tests.helpers.commands import DS_CONFIGS, Done, call, ok, run

pytestmark = [pytest.mark.e2e, pytest.mark.processes]

ARCHIVE = Path(__file__).parents[1] / "old" / "0.1.0.tar.xz"
TRAIN = ("--config", "tiny.yaml", "--deepspeed-config", DS_CONFIGS / "zero1.json")
LEARNED = ("phase", "step", "loss", "lr", "grad_norm", "tokens", "iou", "val_loss")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for folder in tmp_path.glob("runs/*/private"):
        folder.chmod(0o700)
    return tmp_path


def learned(path: Path) -> list[dict[str, Any]]:
    """What a run of the same command repeats to the bit."""
    rows = [{k: row[k] for k in LEARNED if k in row} for row in read_metrics(path)]
    return [row for row in rows if "loss" in row or "val_loss" in row]


def resumed(old: Path, name: str, says: str) -> Done:
    done = ok(run("pretrain.py", *TRAIN, "--run.name", name, cwd=old))
    assert says in done.stdout
    assert "0 elements of the complement changed" in done.stdout
    return done


@pytest.mark.usefixtures("reloaded_here")
def test_a_run_in_pretraining(old: Path):
    status = json.loads(ok(call("status.py", "runs/old", "--json", cwd=old)).stdout)
    assert (status["phase"], status["step"], status["saved_step"]) == ("pretraining", 14, 12)
    resumed(old, "old", "resuming after update 12 of 18")
    folder = RunDir(old / "runs/old")
    assert learned(folder.metrics) == json.loads((old / "expected/metrics.json").read_text())
    assert [start.resumed.get("train") for start in read_starts(folder.metrics)] == [None, 12]
    expected = load_file(old / "expected/weights.safetensors")
    weights = load_file(plain_weights.of_checkpoint(folder, 18).folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)
    ok(call("export.py", "--run", "runs/old", cwd=old))
    assert "(equal)" in ok(call("report.py", "--run", "runs/old", cwd=old)).stdout


def test_a_run_in_discovery(old: Path):
    status = json.loads(ok(call("status.py", "runs/early", "--json", cwd=old)).stdout)
    assert (status["phase"], status["step"]) == ("discovery", 2)
    resumed(old, "early", "resuming discovery after update 2")
    tickets = [load_ticket(RunDir(old / "runs" / name).ticket) for name in ("early", "old")]
    assert tickets[0].id == tickets[1].id
    assert learned(old / "runs/early/metrics.jsonl") == json.loads(
        (old / "expected/metrics.json").read_text()
    )


def test_stores_and_sealed_copies(old: Path):
    assert ok(call("prepare_data.py", "verify", "store", cwd=old)).stdout
    key = ("--identity", "partner.key")
    ok(call("vault.py", "open", "partner.age", *key, "--out", "mine", cwd=old))
    assert load_ticket(old / "mine").id == load_ticket(old / "runs/old/private/ticket").id
    assert "Partner A" in ok(call("vault.py", "list", "--run", "runs/old", cwd=old)).stdout
