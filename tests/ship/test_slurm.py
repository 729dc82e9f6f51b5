"""The SLURM script of docs/OPERATIONS.md under a real slurmctld and two real slurmd.

The script runs as it is printed. What it names is made here: a recipe file `tinyllama-1.1b` and a
store, both tiny. sbatch's own options replace its 8 ranks per node by one.
"""

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pmp_ds.log import read_metrics
from pmp_ds.run_dir import RunDir
from tests.e2e.test_faults import wait_for
from tests.helpers import hosts
from tests.helpers.distributed import REPO
from tests.helpers.workdir import furnish
from tests.ship import needs, slurm

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.nightly,
    pytest.mark.timeout(1200),
    needs.mark("slurm"),
]

NAME, STEPS = "run", 300
OPTIONS = ("--ntasks-per-node=1", "--output=%j.out")


@dataclass(frozen=True)
class Job:
    """Hold a submitted job and its run."""

    cluster: slurm.Cluster
    number: str
    run: RunDir
    out: Path

    def updates(self) -> int:
        """Return the last update of training that metrics.jsonl records."""
        records = read_metrics(self.run.metrics) if self.run.metrics.exists() else []
        return max((r["step"] for r in records if r["phase"] == "train" and "loss" in r), default=0)

    def wait_for_updates(self, more: int = 20) -> int:
        """Wait for some updates beyond those there are."""
        wanted = self.updates() + more
        wait_for(lambda: self.updates() >= wanted)
        return wanted

    def is_done(self) -> str:
        """Wait until the job is completed and return its output."""
        self.cluster.wait(self.number, "COMPLETED", limit=900)
        text = self.out.read_text()
        assert self.cluster.job(self.number)["ExitCode"] == "0:0"
        assert ", 0 elements of the complement changed" in text
        return text


def resumed(text: str) -> list[int]:
    return [int(step) for step in re.findall(rf"resuming after update (\d+) of {STEPS}", text)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    with hosts.two() as pair, slurm.cluster(pair, folder) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the script and with all that it names."""
    work = tmp_path_factory.mktemp("jobs")
    furnish(work)
    recipe = (work / "tiny.yaml").read_text()
    recipe = recipe.replace("steps: 40", f"steps: {STEPS}").replace("name: main", f"name: {NAME}")
    (work / "tinyllama-1.1b").write_text(f"{recipe}guard: {{lost_seconds: 8}}\n")
    shutil.copy(work / "zero2.json", work / "zero2")
    (work / "tokenized_data").mkdir()
    (work / "store").rename(work / "tokenized_data" / "slimpajama-llama")
    text = (REPO / "docs" / "OPERATIONS.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", text, re.DOTALL)
    (work / "job.sh").write_text(script)
    return work


@pytest.fixture
def job(cluster: slurm.Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """Submit the script in a folder of its own and wait until it trains."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    shutil.rmtree(folder / "runs", ignore_errors=True)
    number = cluster.submit("job.sh", *OPTIONS, cwd=folder)
    found = Job(cluster, number, RunDir(folder / "runs" / NAME), folder / f"{number}.out")
    found.wait_for_updates()
    yield found
    cluster.ask("scancel", "--full", number)
    cluster.wait(number, "COMPLETED", "CANCELLED", "FAILED")


def test_signal_then_kill(cluster: slurm.Cluster, job: Job):
    """SIGUSR1, as SLURM sends it before the time limit: saved, requeued, resumed. Then SIGKILL of a
    step: requeued, resumed from the last checkpoint, completed with exit code 0."""
    at = job.wait_for_updates()
    cluster.ask("scancel", "--signal=USR1", job.number)
    cluster.start_again(job.number, 1)
    assert "stopped: " in job.out.read_text()
    stopped = job.updates()
    assert stopped >= at
    job.wait_for_updates()
    cluster.ask("scancel", "--signal=KILL", f"{job.number}.0")
    cluster.start_again(job.number, 2)
    text = job.is_done()
    first, second = resumed(text)
    assert first == stopped, "the signal lost updates"
    assert second >= first
    assert job.updates() == STEPS


def test_preemption(cluster: slurm.Cluster, job: Job, folder: Path):
    """A job of a higher partition takes the nodes: SIGTERM, saved, requeued; afterwards resumed."""
    other = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    urgent = cluster.submit("--wrap=sleep 5", *other, cwd=folder)
    cluster.wait(job.number, "PENDING", restarts=1)
    stopped = job.updates()
    cluster.wait(urgent, "COMPLETED")
    cluster.start_again(job.number, 1)
    assert resumed(job.is_done()) == [stopped], "preemption lost updates"


def test_a_node_cut_off(cluster: slurm.Cluster, job: Job):
    """The ranks notice and exit with 70, the script requeues; with the node back it resumes."""
    cluster.pair.cut("h2")
    began = time.monotonic()
    wait_for(lambda: "gave no sign of life for 8 s" in job.out.read_text())
    cluster.wait(job.number, "PENDING", restarts=1, limit=180)
    print(f"requeued {time.monotonic() - began:.0f} s after the cut")
    cluster.pair.join("h2")
    cluster.start_again(job.number, 1)
    assert len(resumed(job.is_done())) == 1


def test_the_time_limit(cluster: slurm.Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """`--signal=USR1@300` alone makes the job save and requeue itself five minutes before its
    limit. SLURM looks at limits about once a minute."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    shutil.rmtree(folder / "runs", ignore_errors=True)
    endless = (folder / "tinyllama-1.1b").read_text().replace(f"steps: {STEPS}", "steps: 1000000")
    (folder / "endless").write_text(endless)
    script = (folder / "job.sh").read_text().replace("--config tinyllama-1.1b", "--config endless")
    (folder / "endless.sh").write_text(script)
    number = cluster.submit("endless.sh", *OPTIONS, "--time=6", cwd=folder)
    cluster.wait(number, "PENDING", restarts=1)
    text = (folder / f"{number}.out").read_text()
    cluster.ask("scancel", number)
    assert "stopped: SIGUSR1" in text
