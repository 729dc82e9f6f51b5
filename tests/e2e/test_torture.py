"""SIGKILL in every phase of a run. `make torture` is the long form."""

import random
from collections import Counter
from pathlib import Path

import pytest

from pmp_ds.run_dir import RunDir
from tests.e2e.conftest import MainRun
from tests.helpers.faults import seen
from tests.helpers.torture import Phase, Place, comparable, plan, torture

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

KILLS: dict[Phase, int] = {
    "discovery": 1,
    "saving in discovery": 1,
    "training": 1,
    "saving in training": 1,
    "export": 1,
}


@pytest.mark.nightly
def test_killed_in_every_phase(main_run: MainRun, work: Path, tmp_path: Path):
    place = Place(work, RunDir(tmp_path / "main"), ("--run.checkpoint_every", "2"))
    updates = sum(r["phase"] == "discover" for r in comparable(main_run.run.metrics))
    seed = random.randrange(1 << 30)
    blows = plan(KILLS, updates, random.Random(seed))
    print(f"seed {seed}")  # shown when this fails
    fell = list(torture(main_run.run, place, blows, {"export": 3.0}))
    found = Counter(phase for _, phase in fell)
    assert None not in found, fell
    seen("kills", 0, "")
