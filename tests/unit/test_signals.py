"""Signals from the first line of a command to its last."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.distributed import REPO

pytestmark = pytest.mark.processes

# What the main thread does while a signal comes: nothing that lets a Python handler run.
PROGRAM = """
import sys, time, signal
from pmp_ds import signals
from pmp_ds.errors import as_rank, exit_code

as_rank()

def begun():
    print("begun", flush=True)

def main():
    if sys.argv[1] == "in C":
        begun()
        import ctypes
        ctypes.CDLL(None).sleep(600)  # returns only at its end: the signal's own handler is no-op
        ctypes.CDLL(None).sleep(600)
    if sys.argv[1] == "said":
        with signals.farewell(lambda code, text: print(code, text, flush=True)):
            begun()
            time.sleep(600)
    if sys.argv[1] == "two":
        with signals.farewell(lambda *_: print("outer", flush=True)):
            with signals.farewell(lambda *_: print("inner", flush=True)):
                begun()
                time.sleep(600)
    if sys.argv[1] == "mute":
        with signals.farewell(lambda code, text: time.sleep(600)):
            begun()
            time.sleep(600)
    if sys.argv[1] == "ignored":
        begun()
        with signals.reacting(signals.leave, then=signals.ignore):
            pass
        print("saved", flush=True)
        time.sleep(2.0)

with signals.listening():
    code = exit_code(main)
sys.exit(code)
"""


def start(what: str, rank: str = "0") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what],
        cwd=REPO,
        env=os.environ | {"RANK": rank},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("what", ["in C", "said"])
def test_before_there_is_anything_to_save(number, what):
    process = start(what)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    text = f"stopped: {number.name} before there was anything to save; run the same command again\n"
    assert (process.returncode, err) == (75, text)
    assert out == (f"75 {text}" if what == "said" else "")


def test_other_ranks_leave_in_silence():
    process = start("in C", rank="3")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 75


def test_farewells_are_said_from_the_inside_out():
    """A lease is returned before the other ranks are told to end."""
    process = start("two")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "inner\nouter\n"


def test_a_farewell_that_hangs_holds_nobody_up():
    process = start("mute")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert time.monotonic() - began < 30


def test_ignored_when_all_is_saved():
    process = start("ignored")
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
