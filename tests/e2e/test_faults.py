"""Faults of whole processes: killed, stopped and signalled ranks and launchers, with the real
command. Faults that kept ranks can show are in tests/distributed."""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.helpers.commands import kill, ok, start
from tests.helpers.distributed import free_port
from tests.helpers.faults import seen
from tests.helpers.lives import checkpoints, same_end
from tests.helpers.torture import Place, finish

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

Process = subprocess.Popen[str]


@pytest.fixture
def ranks(place: Place) -> Iterator[Callable[..., list[Process]]]:
    """Start the two ranks of ``place`` without a launcher, as another launcher would."""
    started: list[Process] = []

    def begin(*flags: str) -> list[Process]:
        port = str(free_port())
        for rank in ("0", "1"):
            where = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": "2",
                "LOCAL_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            started.append(
                start(
                    "pretrain.py",
                    *place.arguments,
                    *flags,
                    cwd=place.work,
                    env=place.environment() | where,
                )
            )
        return started

    yield begin
    for process in started:
        kill(process)


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.005)


def in_training(place: Place) -> Callable[[], bool]:
    """Return a condition that waits for a complete checkpoint, which is written in the
    background."""
    return lambda: place.last_step("train") >= 5 and bool(checkpoints(place.run))


@pytest.mark.nightly
def test_killed_rank_restarts(place, ranks, main_run):
    """The other rank says why it ends; both restart and reach the same bits."""
    one, other = ranks("--run.restarts", "1")
    wait_for(in_training(place))
    real = next(p for p in place.processes() if p.ppid() == other.pid)
    real.kill()
    first, second = finish(one), finish(other)
    (code,) = re.findall(r"restart 1 of 1: rank 0 ended with code (\d+)", first.stderr)
    seen("killed rank", int(code), first.stderr)
    seen("killed rank, restarts", first.returncode, first.stderr + second.stderr)
    assert second.returncode == 0
    assert "resuming after update" in first.stdout
    same_end(main_run.run, place.run)


@pytest.mark.nightly
def test_hung_rank(place, ranks):
    one, other = ranks("--guard.hang_seconds", "5")
    wait_for(in_training(place))
    other.send_signal(signal.SIGSTOP)
    done = finish(one)
    seen("hung rank", done.returncode, done.stderr)
    stacks = (place.run.stacks / "rank-00000.txt").read_text()
    assert re.match(r"rank 0, update \d+:", stacks)
    assert 'loop.py", line' in stacks
    assert not (place.run.stacks / "rank-00001.txt").exists()
    kept = checkpoints(place.run)
    assert kept
    kill(other)
    assert "resuming after update" in ok(finish(place.pretrain())).stdout


@pytest.mark.nightly
def test_second_signal_ends_a_rank_that_waits(place, ranks):
    """The other rank is suspended, so that this one waits in a collective for ever."""
    one, other = ranks()
    wait_for(in_training(place))
    other.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    one.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert one.poll() is None
    one.send_signal(signal.SIGTERM)
    done = finish(one)
    seen(
        "second signal",
        128 - done.returncode if done.returncode < 0 else done.returncode,
        done.stderr,
    )
    assert "SIGTERM: saving after the next update; signal again to end at once" in done.stderr
    assert checkpoints(place.run)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("number", "fault"),
    [(signal.SIGTERM, "launcher SIGTERM"), (signal.SIGKILL, "killed launcher")],
)
def test_launcher_that_ends(place, main_run, number, fault):
    """On one node `deepspeed` dies at once; its remaining ranks save and stop. The run resumes as
    after any stop (tests/distributed/test_stop.py), here after the worse of the two."""
    process = place.pretrain()
    wait_for(in_training(place))
    process.send_signal(number)
    done = finish(process)
    seen(fault, None if number == signal.SIGTERM else 75, done.stderr)
    wait_for(lambda: not place.processes(), 60)
    (step,) = re.findall(r"saved after update (\d+) of 40", done.stderr)
    assert checkpoints(place.run)[-1] == int(step)
    if number == signal.SIGTERM:
        return
    assert f"resuming after update {step} of 40" in ok(finish(place.pretrain())).stdout
    same_end(main_run.run, place.run)
