"""Jobs over two hosts, each a network namespace: `deepspeed --hostfile` over ssh, torchrun, hosts
that leave and come back, a clock that is off. test_jobs.py has a host without network and one
without the shared folder."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from pmp_ds.log import read_metrics
from pmp_ds.run_dir import RunDir
from tests.e2e.conftest import MainRun
from tests.e2e.test_faults import in_training, wait_for
from tests.helpers import clock, hosts
from tests.helpers.commands import LAUNCHER, Done, error_of, kill, ok, spawn
from tests.helpers.distributed import REPO, free_port
from tests.helpers.lives import same_end
from tests.helpers.torture import Place, finish
from tests.ship import needs, sshd

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.nightly,
    pytest.mark.e2e,
    pytest.mark.timeout(1800),
    needs.mark("hosts"),
]

Process = subprocess.Popen[str]
Begin = Callable[..., Process]
FAST = ("--guard.lost_seconds", "6")
BIN = Path(sys.executable).parent
PRETRAIN = LAUNCHER / "pretrain.py"
HOUR = 3600  # seconds
FIRST_UPDATES = 600.0  # seconds, on a machine that does other things as well


@pytest.fixture
def pair() -> Iterator[hosts.Pair]:
    with hosts.two() as found:
        yield found


@pytest.fixture
def begin(pair: hosts.Pair, place: Place) -> Iterator[Begin]:
    """Start a program on a host: ``begin("h1", "torchrun", ..., env=...)``; killed at the end."""
    started: list[Process] = []

    def call(host: str, *words: str | Path, env: dict[str, str] | None = None) -> Process:
        environment = place.environment() | {"GLOO_SOCKET_IFNAME": "eth0"} | (env or {})
        started.append(spawn(*pair.on(host), *words, cwd=place.work, env=environment))
        return started[-1]

    yield call
    for process in started:
        kill(process)
        process.communicate()


def torchrun(
    begin: Begin, place: Place, *flags: str, program: Path = PRETRAIN, ahead: int = HOUR
) -> list[Process]:
    """Start a torchrun of one rank on each host; the clock of h2 is ``ahead`` seconds ahead."""
    port, shifted = str(free_port()), clock.shifted(place.scratch, ahead) if ahead else {}
    return [
        begin(
            host,
            BIN / "torchrun",
            *("--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1"),
            *("--master-addr=h1", f"--master-port={port}"),
            program,
            *place.arguments,
            *flags,
            env=shifted if rank else {},
        )
        for rank, host in enumerate(hosts.HOSTS)
    ]


def stop(processes: list[Process]) -> list[Done]:
    """Send SIGTERM to the launchers and return how they ended."""
    for process in processes:
        process.terminate()
    return [finish(process) for process in processes]


def losses(run: RunDir) -> list[float]:
    """Return the training losses by update."""
    records = read_metrics(run.metrics)
    found = {r["step"]: r["loss"] for r in records if r["phase"] == "train" and "loss" in r}
    return [found[step] for step in sorted(found)]


def ranks_of(place: Place) -> list[int]:
    """Return the process ids of the ranks, lowest rank first."""
    found = {}
    for process in place.processes():
        with contextlib.suppress(psutil.Error):
            if "RANK" in process.environ() and str(PRETRAIN) in process.cmdline():
                found[process.environ()["RANK"]] = process.pid
    return [found[rank] for rank in sorted(found)]


def test_hostfile(begin: Begin, pair: hosts.Pair, place: Place, main_run: MainRun, tmp_path: Path):
    """`deepspeed --hostfile` starts the ranks over ssh. A signal to one rank saves and ends both;
    the same command resumes and ends with the bits of an undisturbed run."""
    (tmp_path / "hostfile").write_text("h1 slots=1\nh2 slots=1\n")
    (tmp_path / "keys").mkdir(mode=0o700)
    exported = place.environment() | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "PYTHONPATH": str(REPO),
    }
    lines = [f"{name}={value}\n" for name, value in exported.items()]
    (tmp_path / "exported").write_text("".join(lines))

    def job() -> Process:
        words = ("--hostfile", tmp_path / "hostfile", "--master_port", str(free_port()))
        environment = ssh | {"DS_ENV_FILE": str(tmp_path / "exported")}
        return begin("h1", BIN / "deepspeed", *words, PRETRAIN, *place.arguments, env=environment)

    with sshd.on_both(pair, tmp_path / "keys") as ssh:
        first = job()
        wait_for(in_training(place), FIRST_UPDATES)
        os.kill(ranks_of(place)[1], signal.SIGTERM)
        done = finish(first)
        assert done.returncode != 0
        said = done.stdout + done.stderr
        assert re.search(r"stopped: .*SIGTERM.*: saved after update \d+ of 40", said), said
        for host in hosts.HOSTS:
            assert f"{host}: ssh exited with exit code 75" in said
        done = ok(finish(job()))
    assert re.search(r"resuming after update \d+ of 40", done.stdout)
    same_end(main_run.run, place.run)


def test_two_hosts_then_one_then_two(begin: Begin, place: Place, main_run: MainRun):
    """torchrun on both hosts, our launcher on one, torchrun on both: each resumes where the one
    before stopped, and the run ends as an undisturbed one within the tolerance of other ranks."""
    processes = torchrun(begin, place)
    wait_for(in_training(place), FIRST_UPDATES)
    assert [done.returncode for done in stop(processes)] == [1, 1]  # torchrun knows no 75
    both = place.last_step("train")

    launch = ("-m", "pmp_ds.launch", "--ranks", "1", "pretrain", *place.arguments)
    alone = begin("h1", sys.executable, *launch)
    wait_for(lambda: place.last_step("train") >= both + 3, FIRST_UPDATES)
    (done,) = stop([alone])
    assert done.returncode == 75, done.stderr
    assert f"resuming after update {both} of 40" in done.stdout
    one = place.last_step("train")

    done, _ = [ok(finish(process)) for process in torchrun(begin, place)]
    assert f"resuming after update {one} of 40" in done.stdout
    assert ", 0 elements of the complement changed" in done.stdout
    assert losses(place.run) == pytest.approx(losses(main_run.run), rel=1e-4)


def test_doctor(begin: Begin, place: Place):
    """Over two hosts, once with the same time and once with a clock that is off."""
    before = sorted(place.work.rglob("*"))
    doctor = partial(torchrun, begin, place, "--seconds", "20", program=LAUNCHER / "doctor.py")
    well = [ok(finish(process)) for process in doctor(ahead=0)]
    assert "and is seen by others" in well[0].stdout
    late = [finish(process) for process in doctor()]
    assert late[0].returncode == 1
    assert re.search(r"rank 1 on host h2: its clock is 3,\d{3} s ahead of rank 0's", late[0].stdout)
    assert "set the clocks by NTP" in late[0].stdout
    assert sorted(place.work.rglob("*")) == before, "it left something behind"


def test_a_cable_under_torchrun(begin: Begin, pair: hosts.Pair, place: Place, main_run: MainRun):
    """Cut: both ranks end within the deadline, and so do both torchruns, although torchrun itself
    waits. Joined: the same command resumes."""
    processes = torchrun(begin, place, *FAST)
    wait_for(in_training(place), FIRST_UPDATES)
    pair.cut("h2")
    began = time.monotonic()
    one, other = [finish(process) for process in processes]
    assert time.monotonic() - began < 90
    assert (one.returncode, other.returncode) == (1, 1)
    assert "rank 1 on host h2 gave no sign of life for 6 s" in one.stderr
    assert "rank 0 on host h1 gave no sign of life for 6 s" in other.stderr
    pair.join("h2")
    for process in torchrun(begin, place, *FAST):
        ok(finish(process))
    same_end(main_run.run, place.run)


def test_a_clock_an_hour_ahead(begin: Begin, place: Place, tmp_path: Path):
    """A host whose clock is an hour ahead gets no lease that another holds, and takes the one of a
    killed holder after a minute."""
    here = (sys.executable, PRETRAIN, *place.arguments)
    there = ("unshare", "--pid", "--fork", "--kill-child", *here)  # pids of its own
    ahead = clock.shifted(tmp_path, HOUR)
    slow = ("--train.steps", "100000", "--train.schedule", "wsd", "--train.decay_steps", "0")
    first = begin("h1", *here, *slow)
    wait_for(in_training(place), FIRST_UPDATES)
    refused = finish(begin("h2", *there, *slow, env=ahead))
    error_of(refused)
    assert f"on host h1, pid {first.pid}" in refused.stderr
    assert first.poll() is None
    kill(first)
    first.wait()
    begin("h2", *there, *slow, env=ahead)
    at = place.last_step("train")
    wait_for(lambda: place.last_step("train") > at + 3, FIRST_UPDATES)
