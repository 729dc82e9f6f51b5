import subprocess
import sys

import pytest

from pmp_ds.errors import EXIT_READER_GONE, LostRankError, Stopped, UserError, exit_code


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_success(capsys):
    assert exit_code(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rank", [None, "0"])
def test_users_mistake_is_one_line(monkeypatch, capsys, rank):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert exit_code(raising(UserError("train.lr=0 must be positive"))) == 1
    assert capsys.readouterr() == ("", "error: train.lr=0 must be positive\n")


@pytest.mark.parametrize("rank", ["1", "17"])
def test_other_ranks_fail_in_silence(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    assert exit_code(raising(UserError("train.lr=0 must be positive"))) == 1
    assert capsys.readouterr() == ("", "")


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
