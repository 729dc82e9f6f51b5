"""The harness for distributed tests: results, failures and time-outs of real processes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pmp_ds import ranks
from tests.helpers.distributed import REPO, RankError, RankPool, run_ranks

pytestmark = pytest.mark.distributed


def join_gloo() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")


def sum_of_ranks(factor: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    value = torch.tensor([dist.get_rank() + 1]) * factor
    dist.all_reduce(value)
    return {"rank": dist.get_rank(), "sum": value, "pid": os.getpid()}


def fail_on_last_rank() -> None:
    import torch.distributed as dist

    if dist.get_rank() == dist.get_world_size() - 1:
        print("about to fail")
        raise ValueError("the last rank's own message")
    dist.barrier()  # never joined by the last rank


def exit_on_rank_0() -> None:
    if os.environ["RANK"] == "0":
        os._exit(7)


def sleep_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        start_child_and_sleep()


def start_child_and_sleep() -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    time.sleep(300)


def environment(name: str) -> str | None:
    return os.environ.get(name)


def unpicklable() -> Any:
    return lambda: None


def process_group_alive(pid: int) -> bool:
    """Whether any process of the group that ``pid`` leads still runs; a zombie does not."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _parent, group = file.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pid and state != "Z":
                return True
    return False


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, init=join_gloo) as ranks:
        yield ranks


def test_results_come_in_rank_order_from_kept_processes(pool: RankPool) -> None:
    first = pool.run(sum_of_ranks, 10)
    second = pool.run("tests.unit.test_harness:sum_of_ranks", 100)

    assert [result["rank"] for result in first] == [0, 1]
    assert [result["sum"].item() for result in first] == [30, 30]
    assert [result["sum"].item() for result in second] == [300, 300]
    assert [result["pid"] for result in second] == pool.pids == [r["pid"] for r in first]
    assert len({*pool.pids, os.getpid()}) == 3


def test_failing_rank_is_reported_others_are_killed_and_the_pool_recovers(pool: RankPool) -> None:
    pids = [result["pid"] for result in pool.run(sum_of_ranks, 1)]
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.run(fail_on_last_rank, timeout=60)

    assert time.monotonic() - started < 20  # did not wait for the rank that hangs
    message = str(caught.value)
    assert "failed on rank 1 of 2" in message
    assert "ValueError: the last rank's own message" in message
    assert "about to fail" in message
    assert "rank 0 was still running" in message
    assert re.search(r"line \d+ in fail_on_last_rank", message)  # where rank 0 hung
    assert list(caught.value.tracebacks) == [1]
    assert pool.pids == []
    assert not any(process_group_alive(pid) for pid in pids)
    assert [result["sum"].item() for result in pool.run(sum_of_ranks, 1)] == [3, 3]


def test_time_out_kills_grandchildren_and_shows_where_it_hung() -> None:
    with RankPool(2, init=None) as pool:
        pids = [int(pid) for pid in pool.run(os.getpid)]
        with pytest.raises(RankError) as caught:
            pool.run(sleep_on_rank_1, timeout=1)
        alive = [pid for pid in pids if process_group_alive(pid)]
    message = str(caught.value)
    assert "ran out of time" in message
    assert "limit 1 s" in message
    assert "rank 0 finished" in message
    assert "rank 1 was still running" in message
    assert re.search(r"line \d+ in start_child_and_sleep", message)
    assert alive == []


def test_dead_rank_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RankError, match="rank 0 died with exit code 7"):
        run_ranks(2, exit_on_rank_0, init=None, timeout=30)


def test_failure_of_init_is_reported() -> None:
    with pytest.raises(RankError, match=r"(?s)start failed on rank 0 of 1.*no_such_function"):
        run_ranks(1, environment, "RANK", init="tests.unit.test_harness:no_such_function")


def test_environment_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    env = {"ADDED": "new", "INHERITED": None}
    with RankPool(2, init=None, env=env) as pool:
        assert pool.run(environment, "LOCAL_RANK") == ["0", "1"]
        assert pool.run(environment, "WORLD_SIZE") == ["2", "2"]
        assert pool.run(environment, "DS_ACCELERATOR") == ["cpu", "cpu"]
        assert pool.run(environment, "OMP_NUM_THREADS") == ["1", "1"]
        assert pool.run(environment, "ADDED") == ["new", "new"]
        assert pool.run(environment, "INHERITED") == [None, None]


def leave_a_constant_changed() -> None:
    ranks.OTHER_RANKS_WAIT = 1.0


def test_a_name_of_the_package_left_changed_fails_the_test_that_did_it() -> None:
    with (
        RankPool(1, init=None) as pool,
        pytest.raises(RankError, match=r"left changed .*ranks\.OTHER_RANKS_WAIT"),
    ):
        pool.run(leave_a_constant_changed)


def test_what_cannot_travel_is_refused() -> None:
    with RankPool(1, init=None) as pool:
        with pytest.raises(ValueError, match="top-level function"):
            pool.run(lambda: None)
        assert pool.pids == []
        with pytest.raises(RankError, match="lambda"):
            pool.run(unpicklable)


def test_ranks_rest_between_calls(pool: RankPool) -> None:
    pids = [result["pid"] for result in pool.run(sum_of_ranks, 1)]
    deadline = time.monotonic() + 10
    while states(pids) != {"T"} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert states(pids) == {"T"}  # stopped: no thread of an idle rank polls
    assert [result["sum"].item() for result in pool.run(sum_of_ranks, 1)] == [3, 3]


def states(pids: list[int]) -> set[str]:
    """Of all threads."""
    files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {file.read_text().rpartition(")")[2].split()[0] for file in files}


@pytest.mark.parametrize("when", ["in a call", "between calls"])
def test_ranks_end_with_their_parent(when: str) -> None:
    program = (
        "from tests.helpers.distributed import RankPool\n"
        "import os, time\n"
        "pool = RankPool(1, init=None)\n"
        "pool.run(os.getpid)\n"
        "print(*pool.pids, flush=True)\n"
    ) + ("pool.run(time.sleep, 300)\n" if when == "in a call" else "time.sleep(300)\n")
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while process_group_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process_group_alive(pid)
