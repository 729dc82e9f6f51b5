"""What `pmp-ds status` says of runs in every state, their process here, elsewhere, or gone."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pmp_ds import lease
from pmp_ds.commands import status
from pmp_ds.errors import UserError
from pmp_ds.log import begin
from pmp_ds.operate import signs
from pmp_ds.operate.status import State, found_in, states
from pmp_ds.operate.status_words import duration, screen, table
from pmp_ds.run_dir import RunDir, make_private
from pmp_ds.state.manifest import Phase, Position, write_manifest
from tests.helpers.commands import call, error_of, files_of, ok
from tests.helpers.distributed import REPO
from tests.helpers.namespaces import needs

ELSEWHERE = ("unshare", "--pid", "--fork", "--kill-child")
CONFIG = "mask: {max_steps: 50, source: earlybird}\ntrain: {steps: 400}\n"
HOLD = """
import sys
from pathlib import Path
from pmp_ds import lease

lease.BEAT_SECONDS = float(sys.argv[2])
with lease.hold(Path(sys.argv[1]), "the run"):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Return a run that was created and has done nothing."""
    run = RunDir(tmp_path / "x")
    run.create()
    run.config.write_text(CONFIG)
    return run


def holding(run: RunDir, beat_seconds: float, *before: str) -> subprocess.Popen[str]:
    """Start a process that holds the run; ``before``: the words of a program that starts it."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, str(run.root), str(beat_seconds)],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def record(run: RunDir, phase: str, step: int, **values: float | str) -> None:
    with open(run.metrics, "a") as file:
        file.write(json.dumps({"phase": phase, "step": step, **values}) + "\n")


def checkpoint(run: RunDir, step: int, phase: Phase = "train", age: float = 0) -> Path:
    position = Position(
        step=step, consumed_samples=0, ticket_id=None, dataset_id="", val_loss=None, phase=phase
    )
    folder = run.checkpoints / position.name
    folder.mkdir()
    write_manifest(folder, position, {})
    when = time.time() - age
    os.utime(folder / "manifest.json", (when, when))
    return folder


def age(seconds: float, *paths: Path) -> None:
    when = time.time() - seconds
    for path in paths:
        os.utime(path, (when, when))


def of(run: RunDir) -> State:
    (state,) = states([run.root])
    return state


def trained(run: RunDir) -> None:
    """Write 20 updates of 1,024 tokens, each of 0.5 s but one, and a save after ten."""
    record(run, "discover", 7, loss=5.0, iou=0.9)
    record(run, "train", 0, val_loss=6.5)
    for step in range(1, 21):
        rate = 1.0 if step == 20 else 2048.0
        record(run, "train", step, loss=5.0 - step / 10, tokens=step * 1024, tokens_per_second=rate)
    record(run, "train", 20, val_loss=3.25)
    record(run, "train", 10, save_stall_seconds=0.1, save_seconds=2.0)
    checkpoint(run, 10, age=120)


@pytest.fixture
def elsewhere(run: RunDir) -> Iterator["subprocess.Popen[str]"]:
    """Hold the run in a process namespace of its own, as on another machine."""
    process = holding(run, 0.3, *ELSEWHERE)
    yield process
    process.kill()
    process.communicate()


def test_being_created(tmp_path: Path):
    """A folder with nothing but a lease."""
    with lease.hold(tmp_path / "new", "it"):
        (state,) = states(found_in([tmp_path / "new"]))
    assert (state.phase, state.step, state.steps, state.signs.alive) == ("starting", 0, None, True)
    assert state.problems == ()
    assert f"pid {os.getpid()}" in screen(state)


def test_discovery(run: RunDir):
    record(run, "discover", 7, loss=5.5, iou=0.9)
    checkpoint(run, 5, "discover", age=60)
    state = of(run)
    assert (state.phase, state.step, state.steps, state.saved) == ("discovery", 7, 50, 5)
    assert (state.loss, state.seconds_left) == ((7, 5.5), None)
    assert screen(state).startswith(f"{run.root}: discovery, update 7 of at most 50\n")


def test_a_drawn_ticket_ends_discovery(run: RunDir):
    record(run, "discover", 7, loss=5.5)
    (run.ticket / "ticket.json").touch()
    assert (of(run).phase, of(run).step) == ("pretraining", 0)


def test_pretraining(run: RunDir):
    trained(run)
    state = of(run)
    assert (state.phase, state.step, state.steps, state.saved) == ("pretraining", 20, 400, 10)
    assert (state.loss, state.val_loss) == ((20, 3.0), (20, 3.25))
    assert state.seconds_left == 380 * 0.5
    assert state.saved_age == pytest.approx(120, abs=5)
    assert screen(state) == "\n".join(
        (
            f"{run.root}: pretraining, update 20 of 400 (5%)",
            "  process     none; the same command resumes. Last sign of life 0 s ago",
            "  last record 0 s ago",
            "  time left   3 min at 0.5 s per update, and measurements and saves",
            "  last save   update 10, 2 min ago; 10 updates since",
            "  loss        3.0000 at update 20, validation 3.2500 at update 20",
        )
    )


def test_a_resumed_run_is_where_it_resumed(run: RunDir):
    trained(run)
    with open(run.metrics, "a") as file:
        file.write('{"phase": "train", "st')  # killed while it wrote
    assert begin(run.metrics, {"discover": 7, "train": 10}) == 2
    state = of(run)
    assert (state.phase, state.step, state.problems) == ("pretraining", 10, ())
    assert state.loss is None or state.loss[0] <= 10
    record(run, "train", 11, loss=2.5, start=2)
    assert (of(run).step, of(run).loss) == (11, (11, 2.5))


def test_only_the_end_of_a_long_file_is_read(run: RunDir):
    with open(run.metrics, "w") as file:
        file.write("not a record, and far away\n" * 100_000)
        file.write(json.dumps({"phase": "train", "step": 3, "loss": "nan"}) + "\n")
    state = of(run)
    assert state.as_json()["loss"] == "nan"
    run.metrics.write_text('{"phase": "train", "step": 3, "loss": 1.0}\n{"phase": "tr')
    assert (of(run).loss, of(run).problems) == ((3, 1.0), ())  # a line that is being written


def test_finished(run: RunDir, capsys: pytest.CaptureFixture[str]):
    """A finished run is no alarm, however old."""
    trained(run)
    age(9000, checkpoint(run, 400) / "manifest.json", run.metrics)
    assert (of(run).phase, of(run).seconds_left) == ("finished", 0.0)
    assert status.command([str(run.root), "--max-age", "60"]) == 0
    assert "none; the run is finished" in capsys.readouterr().out


@pytest.mark.processes
def test_a_killed_process(run: RunDir, capsys: pytest.CaptureFixture[str]):
    trained(run)
    process = holding(run, 3)
    age(300, run.metrics, run.checkpoints / "update-00000010/manifest.json")
    probe = [str(run.root), "--max-age", "60"]
    assert status.command([*probe, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["alive"], found["pid"], found["host"]) == (True, process.pid, os.uname().nodename)
    assert found["sign_age"] < 60 < found["record_age"]
    process.kill()
    process.communicate()
    (left,) = run.root.glob(".lease-*")
    assert status.command(probe) == 0  # killed less than a minute ago
    age(61, left)
    before = files_of(run.root)
    capsys.readouterr()
    with pytest.raises(SystemExit, match=str(status.EXIT_SILENT)):
        status.command(probe)
    assert f"NOT ALIVE: -c on host {os.uname().nodename}, pid {process.pid}" in (
        capsys.readouterr().out
    )
    assert files_of(run.root) == before


@pytest.mark.processes
def test_a_suspended_process_here_is_silent(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """It keeps its hold, so it is alive; but a probe must notice it."""
    monkeypatch.setattr(signs, "WATCH_SECONDS", 0.5)
    process = holding(run, 1000)
    os.kill(process.pid, signal.SIGSTOP)
    age(600, *run.root.glob(".lease-*"))
    state = of(run)
    assert state.as_json()["alive"]
    assert "  process     runs on this host, but silent for 10 min: -c on host " in screen(state)
    assert table([state]).splitlines()[1].split()[-4:-3] == ["silent"]
    with pytest.raises(SystemExit, match=str(status.EXIT_SILENT)):
        status.command([str(run.root), "--max-age", "60"])
    assert status.command([str(run.root), "--max-age", "900"]) == 0
    with pytest.raises(UserError, match=r"is in use by .*: wait for it or stop it\.$"):
        lease.hold(run.root, "the run").__enter__()
    process.kill()
    process.communicate()


@needs(*ELSEWHERE[1:])
@pytest.mark.processes
def test_a_wrong_clock_kills_nobody(
    run: RunDir, elsewhere: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
):
    """The process elsewhere is alive though its lease looks an hour old, or not written yet; a
    stopped one is not, though by the wrong clock its sign is of the future."""
    right = time.time
    for wrong in (-3600, 3600):
        monkeypatch.setattr(time, "time", lambda wrong=wrong: right() + wrong)
        state = of(run)
        assert state.signs.alive
        assert not state.is_silent(10)
    (child,) = Path(f"/proc/{elsewhere.pid}/task/{elsewhere.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGSTOP)
    monkeypatch.setattr(time, "time", lambda: right() - 3600)
    monkeypatch.setattr(signs, "WATCH_SECONDS", 2.0)
    state = of(run)
    os.kill(int(child), signal.SIGCONT)
    assert not state.signs.alive
    assert state.is_silent(1e9)
    assert "after this host's clock: the ages here are wrong" in state.problems[0]


def test_damage_is_named_and_the_rest_shown(run: RunDir):
    trained(run)
    torn = checkpoint(run, 15) / "manifest.json"
    torn.write_text(torn.read_text().replace('"step": 15', '"step": 16'))
    run.config.write_text("train: {steps: [")
    with open(run.metrics, "a") as file:
        file.write("\0\0\0\n")
    state = of(run)
    assert (state.phase, state.step, state.saved, state.steps) == ("pretraining", 20, 10, None)
    config, metrics, damaged = state.problems
    assert config.startswith(f"{run.config} is not YAML")
    assert metrics == f"{run.metrics} has damaged lines near its end: 1"
    assert damaged == f"checkpoint {torn.parent} is damaged: manifest.json"
    assert screen(state).count("  warning: ") == 3


def test_lost_checkpoints_are_missed(run: RunDir):
    trained(run)
    shutil.rmtree(run.checkpoints)
    assert of(run).problems == (f"{run.checkpoints} has no checkpoint, but one was saved",)
    assert of(run).saved is None


def _as_nobody(folder: str, send: Connection) -> None:
    states([Path(folder)])  # imports what only this user may be able to read
    if os.geteuid() == 0:
        os.setuid(65534)
    send.send(states([Path(folder)])[0].as_json())


def _command_as_nobody(folder: str, send: Connection) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    for words in ([folder, "--json"], [folder], [f"{folder}/a"], [folder, "--max-age", "60"]):
        out = io.StringIO()
        code: object = None
        with contextlib.redirect_stdout(out):
            try:
                code = status.command(words)
            except SystemExit as end:
                code = end.code
        send.send((code, out.getvalue()))


@pytest.mark.processes
def test_a_closed_run_is_a_row():
    """The other runs are shown, and a probe does not take what it cannot see for alive."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        for one in "ab":
            RunDir(Path(name) / one).create()
        (Path(name) / "b/config.yaml").write_text(CONFIG)
        checkpoint(RunDir(Path(name) / "b"), 400)
        (Path(name) / "a").chmod(0)
        receive, send = Pipe(duplex=False)
        process = get_context("fork").Process(target=_command_as_nobody, args=(name, send))
        process.start()
        send.close()
        as_json, as_table, alone, probe = (receive.recv() for _ in range(4))
        process.join()
        (Path(name) / "a").chmod(0o700)
    problem = f"{name}/a cannot be read: Permission denied; make it readable for this user"
    closed, other = map(json.loads, as_json[1].splitlines())
    assert (closed["phase"], closed["alive"], closed["problems"]) == ("unknown", False, [problem])
    assert (other["run"], other["steps"]) == (f"{name}/b", 400)
    assert [line.split()[:4] for line in as_table[1].splitlines()[1:3]] == [
        [f"{name}/a", "unknown", "-", "-"],
        [f"{name}/b", "starting", "0/400", "no"],
    ]
    assert f"warning: {name}/a: {problem}" in as_table[1]
    assert alone[1] == f"{name}/a: unknown\n  warning: {problem}\n"
    assert [code for code, _ in (as_json, as_table, alone, probe)] == [0, 0, 1, status.EXIT_SILENT]


@pytest.mark.processes
def test_another_user_sees_what_is_not_private():
    """Monitoring often has a user of its own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        run = RunDir(Path(name) / "x")
        run.create()
        run.config.write_text(CONFIG)
        trained(run)
        if os.geteuid() != 0:
            run.private.chmod(0)
        receive, send = Pipe(duplex=False)
        process = get_context("fork").Process(target=_as_nobody, args=(str(run.root), send))
        process.start()
        send.close()
        found = receive.recv()
        process.join()
        make_private(run.private)
    assert (found["phase"], found["step"], found["saved_step"]) == ("pretraining", 20, 10)
    assert (found["saved_age"], found["loss"]) == (None, 3.0)
    assert found["problems"] == [
        f"{run.checkpoints} cannot be read: Permission denied; make it readable for this user"
    ]


def test_a_folder_of_runs_is_a_table(run: RunDir, tmp_path: Path):
    trained(run)
    (tmp_path / "notes").mkdir()
    with lease.hold(tmp_path / "y", "y"):
        done = ok(call("status.py", ".", "x", cwd=tmp_path))
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["run", "phase", "update", "alive", "left", "saved", "loss"]
    assert [line.split() for line in lines] == [
        ["x", "pretraining", "20/400", "no", "3", "min", "10", "3.0000"],
        ["y", "starting", "0", "yes", "-", "-", "-"],
        ["x", "pretraining", "20/400", "no", "3", "min", "10", "3.0000"],
    ]


def test_what_studies_and_sweeps_hold_is_shown_as_their_runs(tmp_path: Path):
    study, sweep = tmp_path / "study", tmp_path / "all/sweep"
    with (
        lease.hold(study, "the study"),
        lease.hold(sweep, "a sweep"),
        lease.hold(tmp_path / "all", "a store", prefix="corpus."),
    ):
        runs = [RunDir(study / "runs" / name) for name in ("pmp", "base")]
        cells = [RunDir(sweep / "cells" / name) for name in ("lr=1", "lr=2")]
        for run in (*runs, *cells):
            run.root.mkdir(parents=True)
            run.config.write_text(CONFIG)
        (study / "done").mkdir()
        assert found_in([study]) == sorted(run.root for run in runs)
        assert found_in([sweep]) == found_in([tmp_path / "all"]) == [cell.root for cell in cells]
        with lease.hold(study / "runs" / "next", "the run"):
            assert study / "runs/next" in found_in([study])


def test_mistakes(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for words, message in (
        (["nowhere"], "nowhere is not a folder: name a run, or one with runs"),
        (["empty"], "empty is not a run, and contains none: name runs/NAME or runs"),
        (["empty", "--max-age", "5"], "--max-age 5.0 must be at least 7.5: a process gives a"),
    ):
        assert message in error_of(call("status.py", *words, cwd=tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder"):
        found_in([tmp_path / "file"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (7200, "2.0 h"), (200_000, "2.3 days")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_every_field_is_documented(run: RunDir):
    text = (REPO / "docs/OPERATIONS.md").read_text().partition("| field of `--json`")[2]
    named = [line.split("|")[1] for line in text.partition("\n\n")[0].splitlines()[2:]]
    assert set(re.findall(r"\w+", " ".join(named))) == of(run).as_json().keys()
