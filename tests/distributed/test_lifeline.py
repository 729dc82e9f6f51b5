"""Two ranks of a command, from the start to the exit code: one ends, the other reports it. They
are real processes without a launcher, which would end the other rank itself."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.helpers.distributed import REPO, free_port
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

# Rank 1 does the first argument, while rank 0 waits for it in a collective.
PROGRAM = """
import os, sys, time
from pmp_ds import ranks
from pmp_ds.errors import UserError

ranks.OTHER_RANKS_WAIT = 0.5
what, rank = sys.argv[1], int(os.environ["RANK"])

def boom():
    raise UserError("boom")

def run():
    from pmp_ds import dist
    print("runs", flush=True)
    if what == "mistake of 1" and rank == 1:
        boom()
    if what == "mistake of 0" and rank == 0:
        boom()
    if what == "bug of 1" and rank == 1:
        raise RuntimeError("bug")
    if what == "together":
        dist.together(lambda: boom() if rank == 1 else None)
    if what == "both":
        boom()
    if what == "slow ranks":  # longer than a collective may take
        assert dist.on_rank0(lambda: time.sleep(4) or 7) == 7
        assert dist.together(lambda: time.sleep(4 * rank) or rank, patient=True) == rank
        return
    if what == "wait" and rank == 1:
        time.sleep(600)
    dist.barrier()

def prepare():
    from pmp_ds import dist
    if what == "slow ranks":
        import functools
        dist.init = functools.partial(dist.init, timeout_seconds=3)
    return ranks.Prepared("x", 5.0, run)

sys.exit(ranks.command(prepare))
"""
Process = subprocess.Popen[str]
HOST = socket.gethostname()


@pytest.fixture
def pair() -> Iterator[Callable[[str], list[Process]]]:
    started: list[Process] = []

    def start(what: str) -> list[Process]:
        port = free_port()
        for rank in ("0", "1"):
            where = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": "2",
                "DS_ACCELERATOR": "cpu",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, what],
                    cwd=REPO,
                    text=True,
                    env=os.environ | where,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "runs\n", process.communicate()
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ends(processes: list[Process]) -> list[tuple[int, str]]:
    """Return exit code and standard error of each rank."""
    found = []
    for process in processes:
        _, err = process.communicate(timeout=90)
        found.append((process.returncode, err))
    return found


@pytest.mark.parametrize("what", daily(["mistake of 1", "together"], ["mistake of 1"]))
def test_a_mistake_of_one_rank_is_told_by_rank_0(pair, what):
    assert ends(pair(what)) == [(1, f"error: rank 1 on host {HOST}: boom\n"), (1, "")]


@pytest.mark.parametrize("what", daily(["mistake of 0", "both"], ["mistake of 0"]))
def test_a_mistake_of_rank_0_ends_the_others_alike(pair, what):
    assert ends(pair(what)) == [(1, "error: boom\n"), (1, "")]


def test_a_bug_of_one_rank(pair):
    one, other = ends(pair("bug of 1"))
    assert one[0] == other[0] == 70
    assert "is gone" in one[1]
    assert other[1].startswith("Traceback")


def test_a_killed_rank_is_named(pair):
    processes = pair("wait")
    processes[1].kill()
    code, err = ends(processes)[0]
    assert code == 70
    assert err.startswith(f"fault: rank 0: rank 1 on host {HOST} is gone. The last checkpoint is")
    assert err.count("\n") == 1


@pytest.mark.nightly
def test_a_killed_rank_0_is_named(pair):
    processes = pair("wait")
    processes[0].kill()
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
