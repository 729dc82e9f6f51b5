"""Every command works for a user without a passwd entry, a name or a home, as in a container."""

import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import MainRun
from tests.helpers.commands import Done, ok, run
from tests.helpers.faults import seen
from tests.helpers.namespaces import needs
from tests.helpers.workdir import PREPARE, SHORT

UNSHARE = ("unshare", "-U", "--map-user=12345")
NAMELESS = (
    *UNSHARE,
    "env",
    "-u",
    "USER",
    "-u",
    "LOGNAME",
    "-u",
    "LNAME",
    "-u",
    "USERNAME",
    "-u",
    "HOME",
)
pytestmark = [pytest.mark.e2e, pytest.mark.nightly, needs(*UNSHARE[1:])]


def nameless(launcher: str, *arguments: str | Path, cwd: Path, ranks: int | None = None) -> Done:
    done = ok(run(launcher, *arguments, cwd=cwd, ranks=ranks, before=NAMELESS))
    assert not (cwd / "~").exists()  # the result of expanding "~" without a home
    return done


@pytest.fixture(scope="module")
def folder(main_run: MainRun, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the store and the finished, exported run."""
    folder = tmp_path_factory.mktemp("nameless")
    shutil.copytree(work / "store", folder / "store")
    shutil.copytree(main_run.run.root, folder / "runs" / "main")
    return folder


def test_a_release_is_made(folder: Path):
    shutil.rmtree(folder / "runs/main/release")
    (folder / "runs/main/private/ledger.jsonl").unlink()
    done = nameless("export.py", "--run", "runs/main", "--prompt", "kana", cwd=folder)
    seen("no passwd entry", done.returncode, done.stdout + done.stderr)
    assert "the same logits" in done.stdout
    nameless("export.py", "--check", "runs/main/release", cwd=folder)


@pytest.mark.parametrize(
    "command",
    [
        "evaluate.py perplexity --model runs/main/release --store store",
        "finetune.py --model runs/main/release --task lm --data.store store --train.steps 2",
        "audit.py --release runs/main/release --ticket runs/main/private/ticket",
        "vault.py show runs/main/private/ticket",
        "report.py --run runs/main",
    ],
)
def test_a_release_is_used(folder: Path, command: str):
    nameless(*command.split(), cwd=folder)


def test_data_and_training(work: Path, tmp_path: Path):
    for file in work.glob("*.*"):
        shutil.copy(file, tmp_path)
    nameless("prepare_data.py", *PREPARE, "--out", "store", cwd=tmp_path)
    done = nameless(
        "pretrain.py",
        "--config",
        "tiny.yaml",
        *SHORT,
        "--mask.max_steps",
        "4",
        "--mask.on_unstable",
        "last",
        "--deepspeed-config",
        "zero1.json",
        cwd=tmp_path,
        ranks=2,
    )
    assert "many times slower" not in done.stderr
