"""Checkpoints of a plain DeepSpeed loop, without a mask: killed, then resumed by other ranks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pmp_ds.run_dir import RunDir
from pmp_ds.state.manifest import DamagedError
from pmp_ds.state.shelf import find
from tests.helpers import plain_loop
from tests.helpers.plain_loop import train
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

REPO = Path(__file__).resolve().parents[2]


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys() == {"first.weight", "first.bias", "second.weight", "seen"}
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("stage", "precision", "kind"),
    daily(
        [
            (stage, precision, kind)
            for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"))
            for kind in ("adamw", "sgd")
        ],
        [(0, "fp32", "sgd"), (1, "bf16", "adamw"), (2, "fp32", "sgd"), (3, "bf16", "adamw")],
    ),
)
def test_resumed_to_the_bit(ranks2, tmp_path, stage, precision, kind):
    def run(name: str, steps: int) -> tuple[int, list[float], dict[str, torch.Tensor]]:
        return ranks2.run(train, str(tmp_path / name), stage, steps, kind, precision)[0]

    whole = run("whole", 8)
    assert run("parts", 3)[0] == 0
    assert run("parts", 6)[0] == 3
    begun, losses, weights = run("parts", 8)
    assert (begun, losses) == (6, whole[1][6:])
    assert differ(weights, whole[2]) == 0
    assert whole[1][-1] != pytest.approx(whole[1][-2], abs=1e-9)  # it trains
    kept = sorted(path.name for path in (tmp_path / "parts/private/checkpoints").glob("update-*"))
    assert kept == ["update-00000003", "update-00000006"]


def test_by_other_ranks_at_other_stages(ranks1, ranks2, ranks3, tmp_path):
    whole = ranks2.run(train, str(tmp_path / "whole"), 1, 9)[0]
    folder = str(tmp_path / "parts")
    ranks2.run(train, folder, 1, 3)
    begun, _, _ = ranks3.run(train, folder, 3, 6)[0]
    assert begun == 3
    begun, losses, weights = ranks1.run(train, folder, 2, 9)[0]
    assert begun == 6
    assert losses == pytest.approx(whole[1][6:], rel=1e-5)
    assert differ(weights, whole[2]) < 1e-5


def test_a_damaged_one_is_passed_over(ranks2, tmp_path, capfd):
    ranks2.run(train, str(tmp_path), 1, 6)
    weights = tmp_path / "private/checkpoints/update-00000006/weights/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = find(RunDir(tmp_path))
    assert found is not None
    assert found[1].step == 3
    assert found[1].memory["last"] > 0
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        find(RunDir(tmp_path), 6)


def test_lines_of_the_document_name_what_there_is():
    """The document's calls are those of helpers/plain_loop.py."""
    text = (REPO / "docs" / "LIBRARY.md").read_text(encoding="utf-8")
    used = set(re.findall(r"checkpoints\.(\w+)\(", text))
    assert used == {"find", "load_weights", "resume", "save", "prune"}
    assert all(f"library.{name}(" in Path(plain_loop.__file__).read_text() for name in used)


@pytest.mark.parametrize("updates", daily([[6, 15], [12]], [[12]]))
def test_killed_while_it_trains_and_saves(ranks2, tmp_path, updates):
    """After SIGKILL of all ranks only updates after the last checkpoint are lost."""

    def start(name: str) -> subprocess.Popen[str]:
        command = ["-m", "pmp_ds.launch", "--ranks", "2", "tests/helpers/plain_loop.py"]
        return subprocess.Popen(
            [sys.executable, *command, str(tmp_path / name), "1", "30"],
            cwd=REPO,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(REPO), "DS_ACCELERATOR": "cpu"},
        )

    def result(process: subprocess.Popen[str]) -> tuple[int, list[float]]:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        begun, losses = json.loads(out.splitlines()[-1])
        return begun, losses

    for update in updates:
        killed = start("killed")
        newest = tmp_path / f"killed/private/checkpoints/update-{update:08d}"
        while not newest.exists():
            assert killed.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        assert killed.stdout is not None
        killed.stdout.close()
    begun, losses = result(start("killed"))
    _, undisturbed, _ = ranks2.run(train, str(tmp_path / "whole"), 1, 30)[0]
    assert begun >= updates[-1]
    assert losses == undisturbed[begun:]
