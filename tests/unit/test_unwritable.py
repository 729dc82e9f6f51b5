"""A log on a full disk, or one that nobody reads, neither keeps a process alive nor changes how it
ends."""

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers.distributed import REPO

pytestmark = pytest.mark.processes

PROGRAM = """
import sys, time
from pathlib import Path
from pmp_ds import signals, streams
from pmp_ds.errors import LostRankError, Stopped, UserError, exit_code
from pmp_ds.progress import Progress

def main():
    what = sys.argv[1]
    if what == "stopped":
        raise Stopped("all is saved")
    if what == "lost":
        raise LostRankError("rank 1 is gone")
    if what == "mistake":
        raise UserError("no")
    if what == "progress":
        with Progress("train", "update", total=3, interval=0.0) as bar:
            bar.update(3)
    if what == "asked":
        print("begun", flush=True)
        time.sleep(60)
    if what == "hangs":
        from pmp_ds.run_dir import RunDir
        from pmp_ds.watch.watchdog import Watchdog
        with Watchdog(RunDir(Path("/nowhere/run")), 0.5) as dog:
            dog.beat("step 1")
            time.sleep(60)
    if what == "news":
        streams.forgive("stdout")
        print("saved")
    if what == "result":
        print("a table")

with signals.listening():
    code = exit_code(main)
sys.exit(code)
"""


def start(what: str, *, stdout: int = subprocess.PIPE, reader: bool) -> subprocess.Popen[bytes]:
    """Start the program with standard error on a full disk, or without its ``reader``."""
    end, stderr = os.pipe() if not reader else (-1, os.open("/dev/full", os.O_WRONLY))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what], cwd=REPO, stdout=stdout, stderr=stderr
    )
    os.close(stderr)
    if not reader:
        os.close(end)
    return process


@pytest.mark.parametrize("reader", [True, False], ids=["full disk", "no reader"])
@pytest.mark.parametrize(
    ("what", "code"), [("stopped", 75), ("lost", 70), ("mistake", 1), ("progress", 0)]
)
def test_the_exit_code_stays(what: str, code: int, reader: bool):
    process = start(what, reader=reader)
    process.communicate(timeout=60)
    assert process.returncode == code


@pytest.mark.parametrize("reader", [True, False], ids=["full disk", "no reader"])
def test_a_signal_ends_it(reader: bool):
    process = start("asked", reader=reader)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_a_run_that_hangs_is_ended_without_room_for_stacks():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "hangs"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 70
    assert "no progress for 0.5 s in step 1" in done.stderr
    assert 'File "<string>"' in done.stderr, "the stacks"


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("result", 1, "error: standard output cannot be written: No space left on device\n"),
        ("news", 0, ""),
    ],
)
def test_standard_output_on_a_full_disk(what: str, code: int, said: str):
    """A result that is lost is a mistake; what ranks print is not a result."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, what],
            cwd=REPO,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (code, said)
