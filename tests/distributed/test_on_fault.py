"""The command of `guard.on_fault`: real processes, alone and as two ranks, that end in each way."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pmp_ds import dist, errors, on_fault, ranks, signals
from pmp_ds.errors import Stopped, UserError
from pmp_ds.restarts import run_with_restarts
from pmp_ds.run_dir import RunDir
from pmp_ds.watch.held import held
from pmp_ds.watch.watch import watching
from tests.distributed.test_lifeline import where
from tests.helpers.commands import call
from tests.helpers.distributed import free_port
from tests.helpers.forks import Fork
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

NOTE = (
    'printf "%s|%s|%s|%s|%s\\n" "$PMP_DS_RUN" "$PMP_DS_CODE" "$PMP_DS_REASON" "$PMP_DS_RANK" '
    '"$PMP_DS_HOST" >> "$(dirname "$PMP_DS_RUN")/notes"'
)


def command(what: str, folder: str, hook: str | None) -> int:
    """Do ``what``, as the rank of the environment, in a run's folder that all ranks hold."""
    ranks.OTHER_RANKS_WAIT = 0.5
    run = RunDir(Path(folder))
    rank = int(os.environ["RANK"])

    def go() -> None:
        run.root.mkdir(exist_ok=True)
        with held(run.root, "the run's folder"), watching(run, 1e9, 2.0, 0.0) as watch:
            print("runs", flush=True)
            if what == f"mistake of {rank}":
                raise UserError("boom")
            if what == f"bug of {rank}":
                raise ValueError("a bug\n  on two lines \x1b[2J")
            if what == "stop":
                raise Stopped("SIGTERM: saved after update 7")
            if what == "hang":
                watch.dog.beat("update 7")
                time.sleep(600)
            if what == "wait":
                while True:
                    watch.stop.asked()
                    time.sleep(0.05)
            if what.startswith("bug of"):
                dist.barrier()

    def prepare() -> ranks.Prepared:
        on_fault.watch(hook, run.root, run.on_fault)
        if what == "early":
            print("runs", flush=True)
            time.sleep(600)
        if what == "mistake before":
            print("runs", flush=True)
            raise UserError("boom")
        return ranks.Prepared(str(run.root), 30.0, go)

    return ranks.command(prepare)


Starts = Callable[..., list[Fork]]
HOST = socket.gethostname()


@pytest.fixture
def starts(tmp_path: Path) -> Iterator[Starts]:
    """Return a function that starts one rank or two, and waits until they run."""
    started: list[Fork] = []

    def start(what: str, hook: str | None = NOTE, world: int = 1) -> list[Fork]:
        port = free_port()
        given = (what, str(tmp_path / "run"), hook)
        mine = [
            Fork(command, *given, env=where(rank, port) | {"WORLD_SIZE": str(world)})
            for rank in range(world)
        ]
        started.extend(mine)
        for process in mine:
            assert process.line() == "runs\n", process.end()
        return mine

    yield start
    for process in started:
        process.close()


def notes(folder: Path) -> list[list[str]]:
    """Return the words of each call of NOTE: run, code, reason, rank, host."""
    found = folder / "notes"
    return [line.split("|") for line in found.read_text().splitlines()] if found.exists() else []


@pytest.mark.parametrize(
    ("what", "code", "reason"),
    [
        ("done", 0, None),
        ("mistake of 0", 1, "error: boom"),
        ("mistake before", 1, "error: boom"),
        ("stop", 75, "stopped: SIGTERM: saved after update 7"),
        ("bug of 0", 70, "fault: rank 0: ValueError: a bug on two lines \\x1b[2J"),
        ("hang", 70, "fault: rank 0: no progress for 2 s in update 7: the stacks of the ranks"),
    ],
)
def test_ends_of_one_rank(starts, tmp_path, what, code, reason):
    (one,) = starts(what)
    assert one.end()[0] == code
    expected = [] if reason is None else [[str(tmp_path / "run"), str(code), "0", HOST]]
    assert [[*words[:2], *words[3:]] for words in notes(tmp_path)] == expected
    if reason is not None:
        assert notes(tmp_path)[0][2].startswith(reason)


@pytest.mark.parametrize(
    ("what", "code"), [("early", 75), ("wait", 128 + signal.SIGTERM)], ids=["early", "second"]
)
def test_signals(starts, tmp_path, what, code):
    """A signal before anything can be saved; a second one, for which nothing is waited."""
    (one,) = starts(what)
    one.send_signal(signal.SIGTERM)
    if what == "wait":
        time.sleep(1.5)
        one.send_signal(signal.SIGTERM)
    assert one.end()[0] == code
    deadline = time.monotonic() + 20
    while not notes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [words[1] for words in notes(tmp_path)] == [str(code)]


def test_none_without_the_setting(starts, tmp_path):
    assert starts("mistake of 0", None)[0].end()[0] == 1
    assert not (tmp_path / "run/.on-fault").exists()


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("exit 3", "warning: guard.on_fault: the command ended with code 3\n"),
        ("no-such-program-anywhere", "warning: guard.on_fault: the command ended with code 127\n"),
        ("echo shown; echo also >&2", "shown\nalso\n"),
        ("kill -9 $$", "warning: guard.on_fault: the command ended with code 137\n"),
    ],
)
def test_its_failure_changes_nothing(starts, hook, said):
    code, out, err = starts("mistake of 0", hook)[0].end()
    assert (code, out) == (1, "")
    assert err.startswith("error: boom\n")
    assert err.endswith(said)


def test_it_is_bounded_in_time(tmp_path):
    """Everything that the command started is killed."""
    (tmp_path / "run").mkdir()
    hook = f"cd {tmp_path / 'run'}; sleep 600 & echo $! > {tmp_path}/pid; wait"
    one = Fork(
        bounded, str(tmp_path / "run"), hook, env=where(0, free_port()) | {"WORLD_SIZE": "1"}
    )
    try:
        before = time.monotonic()
        code, _, err = one.end()
    finally:
        one.close()
    assert code == 1
    assert time.monotonic() - before < 60
    assert "the command did not end within 2 s and was killed" in err
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and b"sleep" in _cmdline(pid):
        assert time.monotonic() < deadline, "the command's child still runs"
        time.sleep(0.05)


def _cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def bounded(folder: str, hook: str) -> int:
    on_fault.SECONDS = 2.0
    return command("mistake of 0", folder, hook)


def test_a_signal_meanwhile_does_not_change_the_exit_code(starts, tmp_path):
    """Launchers send SIGTERM to a rank once another has ended. Its descendants get one too."""
    (one,) = starts("mistake before", f"touch {tmp_path}/begun; sleep 2; {NOTE}")
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    one.send_signal(signal.SIGTERM)
    assert one.end()[0] == 1
    assert [words[1] for words in notes(tmp_path)] == ["1"]


def test_it_is_no_descendant_of_the_rank(starts, tmp_path):
    """DeepSpeed's launcher ends all descendants of a rank as soon as another has ended."""
    hook = f"ps -o ppid= -p $(ps -o ppid= -p $$) > {tmp_path}/parent; sleep 1"
    (one,) = starts("bug of 0", hook)
    assert one.end()[0] == 70
    assert int((tmp_path / "parent").read_text()) != one.pid


@pytest.mark.parametrize(
    ("what", "codes", "rank"),
    [
        ("mistake of 1", [1, 1], "0"),
        ("mistake before", [1, 1], "0"),
        ("bug of 1", [70, 70], None),
    ],
)
def test_two_ranks_run_it_once(starts, tmp_path, what, codes, rank):
    processes = starts(what, world=2)
    assert [process.end()[0] for process in processes] == codes
    found = notes(tmp_path)
    assert len(found) == 1
    if rank is not None:
        assert found[0][3] == rank


@pytest.mark.parametrize("victim", daily([0, 1], [0]))
def test_a_killed_rank(starts, tmp_path, victim):
    """The other runs it, whichever it is; the next start runs it again."""
    for number in (1, 2):
        processes = starts("wait", world=2)
        processes[victim].send_signal(signal.SIGKILL)
        assert processes[1 - victim].end()[0] == 70
        found = notes(tmp_path)
        assert len(found) == number
        assert found[-1][1] == "70"
        assert f"fault: rank {1 - victim}: " in found[-1][2]
        assert " is gone. The last checkpoint is intact" in found[-1][2]
        assert found[-1][3] == str(1 - victim)


def killed_child(folder: str) -> int:
    run = RunDir(Path(folder))
    on_fault.watch(NOTE, run.root, run.on_fault)
    with signals.listening():
        return errors.exit_code(lambda: sys.exit(run_with_restarts(["sh", "-c", "kill -9 $$"], 1)))


def test_the_watcher_of_a_killed_process_runs_it(tmp_path):
    (tmp_path / "run").mkdir()
    one = Fork(killed_child, str(tmp_path / "run"), env={"RANK": "0", "WORLD_SIZE": "1"})
    try:
        assert one.end()[0] == 137
    finally:
        one.close()
    assert [words[1:3] for words in notes(tmp_path)] == [["137", "fault: rank 0: ended by SIGKILL"]]


@pytest.mark.parametrize("launcher", daily(["pretrain.py", "finetune.py"], ["pretrain.py"]))
def test_commands_know_it(work, tmp_path, launcher):
    """A start that is refused, by a store that is missing."""
    flags = ["--data.store", "none", "--run.root", tmp_path, "--run.name", "run"]
    if launcher == "finetune.py":
        flags += ["--model", "none", "--task", "lm"]
    (tmp_path / "run").mkdir()
    done = call(launcher, *flags, "--guard.on_fault", NOTE, cwd=work)
    on_fault.watch(None, tmp_path, tmp_path)
    assert done.returncode == 1
    assert [words[1] for words in notes(tmp_path)] == ["1"]
