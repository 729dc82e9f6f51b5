import os
import subprocess
import sys

import pytest

from pmp_ds import errors
from pmp_ds.errors import EXIT_READER_GONE, LostRankError, Stopped, UserError, exit_code

# Does `python -m MODULE`, without the wait of ranks for rank 0's report.
PROGRAM = """
import runpy, sys
from pmp_ds import ranks
ranks.OTHER_RANKS_WAIT = 0
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_success(capsys):
    assert exit_code(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "several"), [(None, True), ("0", True), ("1", False)])
def test_users_mistake_is_one_line(monkeypatch, capsys, rank, several):
    """A command of one process says it even where RANK is set, as in a PyTorchJob's pods."""
    monkeypatch.setattr(errors, "_of_ranks", several)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert exit_code(raising(UserError("train.lr=0 must be positive"))) == 1
    assert capsys.readouterr() == ("", "error: train.lr=0 must be positive\n")


@pytest.mark.parametrize("rank", ["1", "17"])
def test_other_ranks_fail_in_silence(monkeypatch, capsys, rank):
    monkeypatch.setattr(errors, "_of_ranks", False)
    errors.as_rank()
    monkeypatch.setenv("RANK", rank)
    assert exit_code(raising(UserError("train.lr=0 must be positive"))) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["commands", "status", "nowhere"], "nowhere is not a folder"),
        (["launch", "--ranks", "1", "nowhere.py"], "nowhere.py: no such file"),
        (["commands", "pretrain", "--nowhere"], ""),
        (["commands", "doctor", "--nowhere"], ""),
    ],
)
def test_who_reports_where_the_environment_has_a_rank(words, said):
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "1"}
    module, *rest = words
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"pmp_ds.{module}", *rest],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert bool(said) == bool(done.stderr)


def test_interrupt(capsys):
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), AssertionError("x")])
def test_our_own_mistakes_keep_their_traceback(capsys, error):
    assert exit_code(raising(error)) == 70
    assert capsys.readouterr().err.startswith("Traceback")


def test_asked_to_stop(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert exit_code(raising(Stopped("SIGTERM: saved after update 7"))) == 75
    assert capsys.readouterr().err == "stopped: SIGTERM: saved after update 7\n"


def test_fault_is_told_by_every_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert exit_code(raising(LostRankError("another rank is gone"))) == 70
    assert capsys.readouterr().err == "fault: rank 3: another rank is gone\n"


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


@pytest.mark.processes
def test_a_reader_that_has_seen_enough():
    """`inspect | head` ends in silence."""
    code = (
        "from pmp_ds.errors import exit_code\n"
        "def main():\n    while True: print('line', flush=True)\n"
        "raise SystemExit(exit_code(main))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        assert writer.stdout.readline() == b"line\n"
        writer.stdout.close()
        assert writer.stderr.read() == b""
        assert writer.wait(30) == EXIT_READER_GONE
