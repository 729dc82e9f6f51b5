"""Fixtures for the end-to-end tests: one prepared store and one finished run."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pmp_ds.run_dir import RunDir
from tests.helpers.commands import DS_CONFIGS, Done, call, ok, run
from tests.helpers.families import in_this_process
from tests.helpers.torture import Place
from tests.helpers.workdir import furnish


@dataclass(frozen=True)
class MainRun:
    """Hold the main job, done once: the output of each command, and the run's folder."""

    run: RunDir
    prepare: Done
    train: Done
    export: Done
    report: Done


@pytest.fixture(scope="session")
def _furnished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("work")
    return folder, furnish(folder)


@pytest.fixture(scope="session")
def work(_furnished: tuple[Path, Done]) -> Path:
    """Return a folder with a corpus, its store, a recipe and DeepSpeed JSONs
    (helpers/workdir.py)."""
    return _furnished[0]


@pytest.fixture(scope="session")
def main_run(_furnished: tuple[Path, Done]) -> MainRun:
    """Return the main run: two ranks, ZeRO 1, early-bird ticket; exported and reported."""
    work, prepare = _furnished
    train = run(
        "pretrain.py",
        "--config",
        "tiny.yaml",
        "--deepspeed-config",
        DS_CONFIGS / "zero1.json",
        cwd=work,
        ranks=2,
    )
    ok(train)
    export = ok(run("export.py", "--run", "runs/main", "--prompt", "kana", cwd=work))
    with in_this_process():
        report = ok(call("report.py", "--run", "runs/main", "--prompt", "kana", cwd=work))
    return MainRun(RunDir(work / "runs" / "main"), prepare, train, export, report)


@pytest.fixture
def reloaded_here() -> Iterator[None]:
    """Check releases in this process; ``main_run`` has loaded one in a fresh interpreter."""
    with in_this_process():
        yield


@pytest.fixture
def place(main_run: MainRun, work: Path, tmp_path: Path) -> Place:
    """Prepare a run that will equal ``main_run``: same key, less frequent checkpoints."""
    run = RunDir(tmp_path / "main")
    run.create()
    shutil.copy(main_run.run.init / "key", run.init / "key")
    return Place(work, run, ("--run.checkpoint_every", "4"))
