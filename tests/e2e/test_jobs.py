"""Jobs that conflict, and ranks that must find each other: real commands."""

import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.test_faults import in_training, wait_for
from tests.helpers import hosts
from tests.helpers.commands import error_of, files_of, kill, ok, start
from tests.helpers.distributed import free_port
from tests.helpers.faults import seen
from tests.helpers.lives import same_end
from tests.helpers.namespaces import needs
from tests.helpers.tiers import daily
from tests.helpers.torture import Place, finish

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

Process = subprocess.Popen[str]
Begin = Callable[..., Process]
no_hosts = hosts.missing()


@pytest.fixture
def begin(place: Place) -> Iterator[Begin]:
    """Start a process of ``place``: ``begin(*flags, env=..., before=...)``."""
    started: list[Process] = []

    def call(*flags: str, env=None, before=()) -> Process:
        environment = place.environment() | (env or {})
        started.append(
            start(
                "pretrain.py",
                *place.arguments,
                *flags,
                cwd=place.work,
                env=environment,
                before=before,
            )
        )
        return started[-1]

    yield call
    for process in started:
        kill(process)
        process.communicate()


def where(rank: int, port: int, address: str = "127.0.0.1", world: int = 2) -> dict[str, str]:
    """Return the environment that a launcher gives a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


@pytest.mark.nightly
def test_a_second_command_on_one_run(place, begin, main_run):
    first = place.pretrain("--guard.lost_seconds", "0")
    wait_for(in_training(place))
    ranks = [p for p in place.processes() if "RANK" in p.environ()]
    for rank in ranks:  # or it would be done before the second one has imported torch
        rank.suspend()
    second = finish(begin())
    for rank in ranks:
        rank.resume()
    seen("second command", second.returncode, second.stderr)
    error_of(second)
    assert f"on host {socket.gethostname()}, pid " in second.stderr
    ok(finish(first))
    same_end(main_run.run, place.run)


@pytest.mark.nightly  # tests/unit/test_meeting.py, without the rest of the command
def test_a_taken_port(place, begin):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        one, other = begin(env=where(0, port)), begin(env=where(1, port))
        done = finish(one)
    seen("taken port", done.returncode, done.stderr)
    kill(other)  # as a launcher does when a rank has failed
    assert not place.run.root.exists() or not list(place.run.checkpoints.iterdir())


@pytest.mark.nightly
def test_two_jobs_with_the_launchers_default_port(place):
    """Neither job was given a port, and both run on one machine at a time."""
    jobs = [
        start(
            "pretrain.py",
            *place.arguments,
            "--run.name",
            name,
            "--train.steps",
            "12",
            ranks=2,
            cwd=place.work,
            env=place.environment(),
            port=None,
        )
        for name in ("one", "two")
    ]
    for process in jobs:
        ok(finish(process))


MPIRUN = "OMPI_COMM_WORLD_"


@pytest.mark.nightly
def test_ranks_of_mpirun_and_srun_find_each_other(place, begin, main_run):
    """Without an address each rank used to train by itself, in one folder."""
    environments = [
        {
            f"{MPIRUN}SIZE": "2",
            f"{MPIRUN}RANK": str(r),
            f"{MPIRUN}LOCAL_RANK": str(r),
            f"{MPIRUN}LOCAL_SIZE": "2",
            "PMIX_NAMESPACE": place.run.root.parent.name,
        }
        for r in (0, 1)
    ]
    one, other = [finish(p) for p in [begin(env=e) for e in environments]]
    ok(one)
    ok(other)
    assert "x 2 ranks = 8 sequences" in one.stdout
    same_end(main_run.run, place.run)


@needs("--mount")
@pytest.mark.parametrize(
    ("fault", "what"), [("host without the folder", "runs"), ("host without the store", "store")]
)
@pytest.mark.nightly
@pytest.mark.hosts
def test_a_host_without(place, begin, fault, what):
    """On rank 1's host another file system is mounted there."""
    place.run.root.parent.mkdir(parents=True, exist_ok=True)
    folder = place.work / "store" if what == "store" else place.run.root.parent
    elsewhere = f'mount -t tmpfs none {folder} && exec "$@"'
    before, port = files_of(place.run.root), free_port()
    one = begin(env=where(0, port))
    other = begin(env=where(1, port), before=("unshare", "--mount", "sh", "-c", elsewhere, "sh"))
    done = finish(one)
    seen(fault, done.returncode, done.stderr)
    error_of(done)
    assert "the same command" not in done.stderr
    assert finish(other).returncode == 1
    assert files_of(place.run.root) == before


@pytest.mark.skipif(no_hosts is not None, reason=str(no_hosts))
@pytest.mark.nightly
@pytest.mark.hosts
def test_a_host_without_network(place, begin, main_run):
    """Both sides notice within the deadline and name the missing rank; rejoined, they resume."""

    def job() -> list[Process]:
        port = free_port()
        return [
            begin(
                "--guard.lost_seconds",
                "6",
                before=pair.on(host),
                env=where(rank, port, hosts.HOSTS["h1"]) | {"GLOO_SOCKET_IFNAME": "eth0"},
            )
            for rank, host in enumerate(hosts.HOSTS)
        ]

    with hosts.two() as pair:
        processes = job()
        wait_for(in_training(place))
        pair.cut("h2")
        began = time.monotonic()
        one, other = [finish(process) for process in processes]
        assert time.monotonic() - began < 60
        seen("host without network", one.returncode, one.stderr)
        assert "fault: rank 1: rank 0 on host h1 gave no sign of life for 6 s" in other.stderr
        assert other.returncode == 70
        pair.join("h2")
        one, other = [finish(process) for process in job()]
    ok(one)
    assert re.search(r"resuming after update \d+ of 40", one.stdout)
    same_end(main_run.run, place.run)


@pytest.mark.parametrize("seconds", daily([0.5, 2.0, 4.0, 7.0], [4.0]))
def test_a_signal_during_the_start(place, begin, seconds):
    """The signal arrives while modules are imported, ranks wait for each other, a store is read."""
    port = free_port()
    processes = [begin(env=where(rank, port)) for rank in (0, 1)]
    time.sleep(seconds)
    assert place.last_step("discover") == 0
    for process in processes:
        process.send_signal(signal.SIGTERM)
    one, other = [finish(process) for process in processes]
    if "saving after the next update" not in one.stderr:  # a fast machine was in discovery by then
        seen("signal during start", one.returncode, one.stderr)
    assert (one.returncode, other.returncode) == (75, 75)


@pytest.mark.nightly
def test_a_signal_to_one_rank_during_the_start(place, begin):
    """The other ranks end with the same code, and rank 0 says why."""
    port = free_port()
    processes = [begin(env=where(rank, port)) for rank in (0, 1)]
    wait_for(lambda: list(place.run.root.glob(".lease-*")) != [])
    processes[1].send_signal(signal.SIGUSR1)
    one, other = [finish(process) for process in processes]
    assert (one.returncode, other.returncode) == (75, 75)
    assert re.search(r"stopped: (rank 1 on host \S+: )?SIGUSR1", one.stderr), one.stderr
    assert list(place.run.root.glob(".lease-*")) == []
