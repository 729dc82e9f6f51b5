"""A rank that starts again after a fault: real processes that end in every way."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmp_ds.restarts import CHILD, is_child, run_with_restarts
from tests.helpers.distributed import REPO

pytestmark = pytest.mark.processes

# Notes its port in a file, then ends as the n-th argument says: a code, or a signal by its name.
PROGRAM = """
import os, signal, sys
notes, *ends = sys.argv[1:]
with open(notes, "a") as file:
    file.write(os.environ.get("MASTER_PORT", "-") + " " + os.environ["PMP_RESTARTS_CHILD"] + "\\n")
end = ends[len(open(notes).readlines()) - 1]
if end.startswith("SIG"):
    os.kill(os.getpid(), signal.Signals[end])
sys.exit(int(end))
"""


@pytest.fixture(autouse=True)
def handlers():
    """Restore the signal handlers, which restarts replaces for the whole process."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("ends", "restarts", "code", "starts"),
    [
        (["0"], 3, 0, 1),
        (["70", "0"], 3, 0, 2),
        (["SIGKILL", "70", "0"], 3, 0, 3),
        (["70", "70", "70"], 2, 70, 3),
        (["SIGKILL", "SIGKILL"], 1, 128 + 9, 2),
        (["1"], 3, 1, 1),  # a mistake will be one again
        (["75"], 3, 75, 1),  # asked to stop
        (["70", "75"], 3, 75, 2),
    ],
)
def test_ends(tmp_path, monkeypatch, capfd, ends, restarts, code, starts):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "40000")
    notes = tmp_path / "notes"
    command = [sys.executable, "-c", PROGRAM, str(notes), *ends]
    assert run_with_restarts(command, restarts) == code
    assert len(notes.read_text().splitlines()) == starts
    assert notes.read_text().splitlines()[0].split()[1] == "1"
    assert capfd.readouterr().err.count("rank 1 ended with ") == starts - 1


def test_every_attempt_has_a_port_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "40000")
    notes = tmp_path / "notes"
    run_with_restarts([sys.executable, "-c", PROGRAM, str(notes), "70", "SIGSEGV", "0"], 5)
    ports = [line.split()[0] for line in notes.read_text().splitlines()]
    assert len(set(ports)) == 3


def test_only_a_child_is_one(monkeypatch):
    monkeypatch.delenv(CHILD, raising=False)
    assert not is_child()


WATCHER = """
import sys
from pmp_ds.restarts import run_with_restarts
sys.exit(run_with_restarts([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], 3))
"""
# Says its pid, and ends with 75 when it is asked to stop.
WAITING = """
import os, signal, sys, time
from pmp_ds.restarts import is_child
assert is_child()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.replace(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


@pytest.fixture
def watched(tmp_path):
    """Return a process that watches another, and the other's pid."""
    notes = tmp_path / "pid"
    watcher = subprocess.Popen([sys.executable, "-c", WATCHER, WAITING, notes], cwd=REPO)
    while not notes.exists():
        assert watcher.poll() is None
        time.sleep(0.01)
    yield watcher, int(notes.read_text())
    watcher.kill()
    watcher.wait()


def test_signals_are_passed_on_and_end_it(watched):
    watcher, _ = watched
    watcher.send_signal(signal.SIGTERM)
    assert watcher.wait(timeout=60) == 75


def test_a_killed_watcher_leaves_nobody_behind(watched):
    watcher, pid = watched
    watcher.kill()
    watcher.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in _state(pid):
        assert time.monotonic() < deadline, "it runs on"
        time.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
