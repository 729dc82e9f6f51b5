"""Two ranks of a command, from the start to the exit code: one ends, the other reports it. They
are real processes without a launcher, which would end the other rank itself."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from pmp_ds import dist, ranks
from pmp_ds.errors import UserError
from tests.helpers.distributed import REPO, free_port
from tests.helpers.forks import Fork
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

Pair = Callable[[str], list[Fork]]
HOST = socket.gethostname()


def command(what: str) -> int:
    """Rank 1 does ``what``, while rank 0 waits for it in a collective."""
    ranks.OTHER_RANKS_WAIT = 0.5
    rank = int(os.environ["RANK"])

    def boom() -> None:
        raise UserError("boom")

    def run() -> None:
        print("runs", flush=True)
        if (what, rank) in (("mistake of 1", 1), ("mistake of 0", 0)) or what == "both":
            boom()
        if what == "bug of 1" and rank == 1:
            raise RuntimeError("bug")
        if what == "together":
            dist.together(lambda: boom() if rank == 1 else None)
        if what == "slow ranks":  # longer than a collective may take
            assert dist.on_rank0(lambda: late(4, 7)) == 7
            assert dist.together(lambda: late(4 * rank, rank), patient=True) == rank
            return
        if what == "wait" and rank == 1:
            time.sleep(600)
        dist.barrier()

    def prepare() -> ranks.Prepared:
        if what == "slow ranks":
            dist.init = functools.partial(dist.init, timeout_seconds=3)
        return ranks.Prepared("x", 5.0, run)

    return ranks.command(prepare)


def late(seconds: float, value: int) -> int:
    time.sleep(seconds)
    return value


def where(rank: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def pair() -> Iterator[Pair]:
    started: list[Fork] = []

    def start(what: str) -> list[Fork]:
        port = free_port()
        started.extend(Fork(command, what, env=where(rank, port)) for rank in (0, 1))
        for process in started:
            assert process.line() == "runs\n", process.end()
        return started

    yield start
    for process in started:
        process.close()


def ends(processes: list[Fork]) -> list[tuple[int, str]]:
    """Return exit code and standard error of each rank."""
    return [(code, err) for code, _, err in (process.end() for process in processes)]


def test_fresh_interpreters():
    """The other tests fork their ranks: to the end of the process these are the same."""
    program = f"import sys; from {__name__} import command; sys.exit(command('mistake of 1'))"
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=REPO,
            text=True,
            env=os.environ | where(rank, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    found = [(process.communicate(timeout=90), process.returncode) for process in ranks]
    error = f"error: rank 1 on host {HOST}: boom\n"
    assert found == [(("runs\n", error), 1), (("runs\n", ""), 1)]


@pytest.mark.parametrize("what", ["mistake of 1", "together"])
def test_a_mistake_of_one_rank_is_told_by_rank_0(pair, what):
    assert ends(pair(what)) == [(1, f"error: rank 1 on host {HOST}: boom\n"), (1, "")]


@pytest.mark.parametrize("what", ["mistake of 0", "both"])
def test_a_mistake_of_rank_0_ends_the_others_alike(pair, what):
    assert ends(pair(what)) == [(1, "error: boom\n"), (1, "")]


def test_a_bug_of_one_rank(pair):
    one, other = ends(pair("bug of 1"))
    assert one[0] == other[0] == 70
    assert "is gone" in one[1]
    assert other[1].startswith("Traceback")


def test_a_killed_rank_is_named(pair):
    processes = pair("wait")
    processes[1].send_signal(signal.SIGKILL)
    code, err = ends(processes)[0]
    assert code == 70
    assert err.startswith(f"fault: rank 0: rank 1 on host {HOST} is gone. The last checkpoint is")
    assert err.count("\n") == 1


@pytest.mark.nightly
def test_a_killed_rank_0_is_named(pair):
    processes = pair("wait")
    processes[0].send_signal(signal.SIGKILL)
    code, err = ends(processes)[1]
    assert code == 70
    assert err.startswith(f"fault: rank 1: rank 0 on host {HOST} is gone. The last checkpoint is")


@pytest.mark.parametrize("rank", daily([0, 1], [1]))
def test_a_rank_that_gives_no_sign(pair, rank):
    processes = pair("wait")
    processes[rank].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    code, err = ends([processes[1 - rank]])[0]
    assert code == 70
    assert f"rank {rank} on host {HOST} gave no sign of life for 5 s" in err
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("rank", daily([0, 1], [1]))
def test_a_signal_to_one_rank_ends_both(pair, rank):
    processes = pair("wait")
    processes[rank].send_signal(signal.SIGTERM)
    one, other = ends(processes)
    who = f"rank 1 on host {HOST}: " if rank == 1 else ""
    assert one[0] == 75
    assert one[1] == (
        f"stopped: {who}SIGTERM before there was anything to save; run the same command again\n"
    )
    assert other == (75, "")


def test_ranks_may_take_their_time(pair):
    assert ends(pair("slow ranks")) == [(0, ""), (0, "")]
