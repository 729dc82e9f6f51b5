"""One writer at a time: real processes, killed, stopped, and on a simulated other machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmp_ds import lease
from pmp_ds.errors import UserError
from pmp_ds.lease import hold
from tests.helpers.distributed import REPO
from tests.helpers.namespaces import needs

pytestmark = pytest.mark.processes

# Holds the folder until its input ends; short times, so that tests need not wait for a minute.
PROGRAM = """
import sys
from pathlib import Path
from pmp_ds import lease
from pmp_ds.errors import exit_code

lease.BEAT_SECONDS, lease.STALE_SECONDS = 0.1, float(sys.argv[2])

def main():
    with lease.hold(Path(sys.argv[1]), "the run x") as held:
        print("holds", held.path.name, flush=True)
        sys.stdin.read()

sys.exit(exit_code(main))
"""
ELSEWHERE = ("unshare", "--pid", "--fork", "--kill-child")
needs_namespaces = needs(*ELSEWHERE[1:])


def start(folder: Path, *prefix: str, stale: float = 2.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", PROGRAM, str(folder), str(stale)],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def holds(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("holds "), process.communicate()
    return line.split()[1]


@pytest.fixture
def holder(tmp_path):
    process = start(tmp_path / "x")
    assert holds(process) == ".lease-000001"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_told_who_holds_it(tmp_path, holder):
    out, err = start(tmp_path / "x").communicate("")
    assert out == ""
    assert err.startswith(f"error: the run x is in use by -c on host {os.uname().nodename}, pid ")
    assert f"pid {holder.pid}, since 2" in err
    assert "wait for it or stop it" in err


def test_the_job_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with hold(tmp_path, "x"), pytest.raises(UserError, match=r"pid \d+, SLURM job 17, since"):
        hold(tmp_path, "x").__enter__()


def test_free_again_and_nothing_left(tmp_path, holder):
    holder.communicate("")
    assert holder.returncode == 0
    assert not (tmp_path / "x").exists()  # it was made for the lease alone
    assert start(tmp_path / "x").communicate("")[0] == "holds .lease-000001\n"


def test_what_came_into_the_folder_stays(tmp_path):
    with hold(tmp_path / "runs" / "x", "x"):
        (tmp_path / "runs" / "x" / "file").touch()
    assert [p.name for p in (tmp_path / "runs" / "x").iterdir()] == ["file"]


def test_a_killed_holder_on_this_machine_is_no_holder(tmp_path, holder):
    holder.kill()
    holder.wait()
    began = time.monotonic()
    assert start(tmp_path / "x", stale=600).communicate("")[0] == "holds .lease-000002\n"
    assert time.monotonic() - began < 300


def test_a_process_number_that_was_given_again(tmp_path):
    """The file names a running process that is not the holder."""
    with hold(tmp_path, "x") as held:
        values = json.loads(held.path.read_text())
    values["started"] -= 1
    (tmp_path / ".lease-000001").write_text(json.dumps(values))
    with hold(tmp_path, "x") as held:
        assert held.path.name == ".lease-000002"


@needs_namespaces
def test_a_holder_on_another_machine(tmp_path):
    """In another process namespace its number means nothing: only its signs of life count."""
    other = start(tmp_path / "x", *ELSEWHERE)
    holds(other)
    out, err = start(tmp_path / "x", stale=60.0).communicate("")
    assert (out, err.count("is in use by")) == ("", 1)
    assert json.loads((tmp_path / "x" / ".lease-000001").read_text())["beats"] > 0
    other.kill()
    other.communicate()


@needs_namespaces
def test_a_holder_that_gives_no_sign_loses_it(tmp_path):
    other = start(tmp_path / "x", *ELSEWHERE)
    holds(other)
    (child,) = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGSTOP)
    process = start(tmp_path / "x")
    assert holds(process) == ".lease-000002"
    os.kill(int(child), signal.SIGCONT)
    assert other.stderr is not None
    err = other.stderr.read()
    other.communicate()
    assert "fault: the run x was taken over by another process while this one gave no sign" in err
    assert other.returncode == 70
    assert (tmp_path / "x" / ".lease-000002").exists()
    _, err = process.communicate("")
    assert "gives no sign of life: taking it over in" in err


def test_many_at_once(tmp_path):
    """After a holder that is gone, exactly one of them gets it; the others name that one."""
    first = start(tmp_path / "x")
    holds(first)
    first.kill()
    first.communicate()
    several = [start(tmp_path / "x") for _ in range(6)]
    time.sleep(0.5)
    won = [p for p in several if p.stdout and p.stdout.readline().startswith("holds")]
    assert len(won) == 1
    for process in several:
        _, err = process.communicate("")
        assert process in won or f"pid {won[0].pid}" in err


def test_a_lease_that_was_removed_by_hand_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    with hold(tmp_path, "x") as held:
        held.path.unlink()
        deadline = time.monotonic() + 30
        while not held.path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_half_a_file_is_watched_like_any(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)
    (tmp_path / ".lease-000007").write_text("{")
    with hold(tmp_path, "x") as held:
        assert held.path.name == ".lease-000008"
        assert not (tmp_path / ".lease-000007").exists()
    assert "held by a process that did not write who it is" in capsys.readouterr().err


def test_names_with_glob_characters(tmp_path, monkeypatch):
    """Only the file with exactly this name is replaced."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.5)
    (tmp_path / ".ax.lease-000001").touch()
    (tmp_path / ".[ab]x.lease-000001").write_text("{")
    with hold(tmp_path, "it", prefix="[ab]x."):
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            ".[ab]x.lease-000002",
            ".ax.lease-000001",
        ]


def test_two_names_in_one_folder(tmp_path):
    with hold(tmp_path, "a", prefix="a."), hold(tmp_path, "b", prefix="b."):
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            ".a.lease-000001",
            ".b.lease-000001",
        ]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the run cannot be written: .*Not a directory"):
        hold(tmp_path / "file" / "x", "the run").__enter__()


def test_seen(tmp_path):
    with hold(tmp_path, "x") as held:
        assert lease.is_seen(held.path, held.holder.token)
        assert not lease.is_seen(held.path, "another token", seconds=0.2)
        assert not lease.is_seen(tmp_path / "other" / held.path.name, held.holder.token, 0.2)
