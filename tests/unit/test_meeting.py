"""Ranks that meet before they compute: real processes at real ports."""

import socket
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from pmp_ds import meeting
from pmp_ds.errors import as_rank, exit_code
from pmp_ds.meeting import in_words
from tests.helpers.distributed import free_port
from tests.helpers.forks import Fork

pytestmark = pytest.mark.processes


def meet(run: str | None, mistake: str | None, seconds: float) -> int:
    """Meet, then hold the port until the input ends."""
    meeting.TELL_SECONDS, meeting.MISTAKE_SECONDS = 0.5, 1.0

    def main() -> None:
        met = meeting.meet(run, mistake, seconds)
        print("met", met.name(1), flush=True)
        sys.stdin.read()

    as_rank()
    return exit_code(main)


@pytest.fixture
def rank() -> Iterator[Callable[..., Fork]]:
    """Start a rank: ``rank(0, port, run="a")``."""
    started: list[Fork] = []

    def start(number, port, run="runs/a", mistake=None, seconds=60.0, world=2) -> Fork:
        where = {
            "RANK": str(number),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        started.append(Fork(meet, run, mistake, seconds, env=where))
        return started[-1]

    yield start
    for process in started:
        process.close()


def end(process: Fork) -> tuple[int, str, str]:
    return process.end(60)


def met(process: Fork) -> bool:
    return process.line() == f"met rank 1 on host {socket.gethostname()}\n"


def test_they_meet(rank):
    port = free_port()
    one, other = rank(0, port), rank(1, port)
    assert met(one)
    assert met(other)
    found = psutil.Process(one.pid).net_connections()
    assert {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    assert [end(p)[0] for p in (one, other)] == [0, 0]


def test_a_taken_port(rank):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        code, _, err = end(rank(0, port))
    assert code == 1
    assert err == (  # at once
        f"error: port {port} of {socket.gethostname()} is taken, so the ranks cannot meet at "
        f"127.0.0.1:{port}: another job may use it; give each job its own port (deepspeed "
        "--master_port, torchrun --master-port, or MASTER_PORT)\n"
    )


def test_the_port_of_another_job(rank):
    """Its own rank 0 could not listen there; it does not wait in the first job's place."""
    port = free_port()
    one, other = rank(0, port), rank(1, port)
    assert met(one)
    assert met(other)
    began = time.monotonic()
    lost = rank(1, port, run="runs/b")
    assert lost.wait(60) == 1  # told by its own rank 0
    assert time.monotonic() - began < 30
    again = rank(1, port)
    assert again.wait(60) == 1
    assert (end(one)[0], end(other)[0]) == (0, 0)


def test_a_mistake_of_one_rank_is_told_by_rank_0(rank):
    port = free_port()
    one, other = rank(0, port), rank(1, port, mistake="store x is missing")
    host = socket.gethostname()
    code, _, err = end(one)
    assert (code, err.splitlines()[-1]) == (1, f"error: rank 1 on host {host}: store x is missing")
    assert end(other)[:2] == (1, "")


def test_a_mistake_of_all_ranks_is_told_once(rank):
    port = free_port()
    both = [rank(r, port, run=None, mistake="train.lr=0 must be positive") for r in (0, 1)]
    ends = [end(process) for process in both]
    assert [code for code, _, _ in ends] == [1, 1]
    assert "".join(err for _, _, err in ends).count("error: train.lr=0 must be positive\n") == 1


def test_a_mistake_does_not_wait_for_those_that_never_come(rank):
    code, _, err = end(rank(0, free_port(), mistake="train.lr=0 must be positive", world=3))
    assert code == 1
    assert err.splitlines()[-1] == "error: train.lr=0 must be positive"


def test_ranks_that_do_not_come(rank):
    port = free_port()
    one, other = rank(0, port, world=4, seconds=1.5), rank(2, port, world=4)
    code, _, err = end(one)
    assert code == 70, "a host that comes later is no mistake"
    assert f"waiting for rank 1, 3 at 127.0.0.1:{port}, " in err
    assert f"fault: rank 0: rank 1, 3 at 127.0.0.1:{port} did not come: check that" in err
    assert end(other)[0] == 70


def test_a_rank_0_that_does_not_come(rank):
    port = free_port()
    process = rank(1, port, seconds=1.5)
    assert process.wait(60) == 70
    err = end(process)[2]
    assert f"waiting for rank 0 at 127.0.0.1:{port}" in err
    assert f"fault: rank 1: rank 0 at 127.0.0.1:{port}" in err


@pytest.mark.parametrize(
    ("mistakes", "text"),
    [
        ([None, None], None),
        (["a", "a"], "a"),
        ([None, "a"], "r1: a"),
        (["b", "a"], "r0: b\n  r1: a"),
        (["a", None, "a"], "r0 and 1 more: a"),
        (["a", "b", "c", "d", "e"], "r0: a\n  r1: b\n  r2: c"),
    ],
)
def test_in_words(mistakes, text):
    assert in_words(mistakes, [f"r{i}" for i in range(len(mistakes))]) == text
