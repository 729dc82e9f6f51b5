"""Fixtures for tests of whole runs: a place to work in and an undisturbed run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pmp_ds.run_dir import RunDir
from tests.helpers.commands import call
from tests.helpers.distributed import RankPool
from tests.helpers.lives import Life, live
from tests.helpers.workdir import furnish

Living = Callable[..., list[Life]]


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a store, a recipe and DeepSpeed JSONs (helpers/workdir.py)."""
    folder = tmp_path_factory.mktemp("place")
    furnish(folder, call)
    return folder


@pytest.fixture(scope="session")
def calm(work: Path, ranks2: RankPool) -> RunDir:
    """Return an undisturbed run with the settings of helpers/lives.py."""
    lives = ranks2.run(live, str(work), ["--run.root", str(work / "calm"), "--init.seed", "1"])
    assert [one.code for one in lives] == [0, 0], lives[0]
    assert "warning" not in lives[0].err
    return RunDir(work / "calm" / "main")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Return the run used by ``lives``."""
    return RunDir(tmp_path / "main")


@pytest.fixture
def lives(work: Path, ranks2: RankPool, tmp_path: Path) -> Living:
    """Return a function that does ``run`` on two ranks: ``lives(*flags, fault=..., given=(...),
    stage=1)``."""

    def lead(*flags: str, fault=None, given=(), stage=1, pool: RankPool = ranks2) -> list[Life]:
        settings = ["--run.root", str(tmp_path), "--init.seed", "1", *flags]
        return pool.run(live, str(work), settings, fault, given, stage)

    return lead


@pytest.fixture(scope="session")
def written(ranks2: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of three updates with a checkpoint of each."""
    from tests.distributed.test_checkpoint import segment

    root = tmp_path_factory.mktemp("written") / "run"
    ranks2.run(segment, str(root), 2, "bf16", True, False, 3, [1, 2, 3])
    return root
