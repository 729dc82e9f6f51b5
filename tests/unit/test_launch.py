"""The launcher of one machine's ranks: real processes, real signals, process 1 of a namespace."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmp_ds import __version__
from tests.helpers.distributed import REPO
from tests.helpers.namespaces import needs

pytestmark = pytest.mark.processes

CONTAINER = ("unshare", "--pid", "--fork", "--kill-child")

# A rank: notes what it finds, then ends as the argument of its number says. `wait` waits for a
# signal and ends with 75, `deaf` ignores SIGTERM, `orphan` leaves a process behind, SIGx kills it.
RANK = """
import os, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
end = sys.argv[2:][int(os.environ["LOCAL_RANK"])]
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
if end == "wait":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: sys.exit(75))
if end == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(f"{sys.argv[1]}/{rank}.new", "w") as file:
    file.write(" ".join(os.environ[n] for n in names))
os.replace(f"{sys.argv[1]}/{rank}.new", f"{sys.argv[1]}/{rank}")
if end in ("wait", "deaf"):
    time.sleep(600)
if end == "orphan":
    subprocess.Popen(["sh", "-c", "sleep 0.2"])
    end = "0"
if end.startswith("SIG"):
    os.kill(os.getpid(), signal.Signals[end])
sys.exit(int(end))
"""
QUICK = (
    "import sys; from pmp_ds import launch, errors; launch.END_SECONDS = launch.KILL_SECONDS = 0.5;"
    " sys.exit(errors.exit_code(launch.main))"
)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[object]:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    started: list[subprocess.Popen[str]] = []

    def start(*ends: str, options=(), prefix=(), env=None) -> subprocess.Popen[str]:
        command = [
            *prefix,
            sys.executable,
            "-c",
            QUICK,
            "--ranks",
            str(len(ends)),
            *options,
            str(script),
            str(tmp_path),
            *ends,
        ]
        base = {k: v for k, v in os.environ.items() if not k.startswith("MASTER_")}
        started.append(
            subprocess.Popen(
                command,
                cwd=REPO,
                env=base | (env or {}),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def notes(folder: Path, *ranks: int) -> list[list[str]]:
    """Return the notes of the ranks, once all have written theirs."""
    deadline = time.monotonic() + 60
    while not all((folder / str(rank)).exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [(folder / str(rank)).read_text().split() for rank in ranks]


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (["0", "0"], 0),
        (["75", "75"], 75),
        (["70", "1"], 1),  # a mistake counts more than that the other rank was lost by it
        (["70", "SIGKILL"], 70),
        (["75", "70"], 70),
        (["SIGKILL", "SIGKILL"], 137),
        (["0", "SIGSEGV"], 139),
        (["1", "deaf"], 1),  # what it has to kill does not count
        (["SIGKILL", "wait"], 137),
    ],
)
def test_exit_codes(launch, ends, code):
    assert launch(*ends).wait(60) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_every_rank(launch, tmp_path, number):
    process = launch("wait", "wait", "wait")
    notes(tmp_path, 0, 1, 2)
    process.send_signal(number)
    assert process.wait(60) == 75


def test_what_ranks_find(launch, tmp_path):
    assert launch("0", "0").wait(60) == 0
    one, other = notes(tmp_path, 0, 1)
    assert one[:5] == ["0", "0", "2", "2", "127.0.0.1"]
    assert other[:2] == ["1", "1"]
    assert one[5] == other[5] != "0"


def test_the_second_of_three_machines(launch, tmp_path):
    options = ("--nodes", "3", "--master-addr", "h0", "--master-port", "4000")
    process = launch("0", "0", options=options, env={"JOB_COMPLETION_INDEX": "1"})
    assert process.wait(60) == 0
    assert notes(tmp_path, 2, 3) == [
        ["2", "0", "6", "2", "h0", "4000"],
        ["3", "1", "6", "2", "h0", "4000"],
    ]


@needs(*CONTAINER[1:])
def test_process_1_of_a_container(launch, tmp_path):
    """It gets SIGTERM although the kernel protects process 1, and reaps the processes of a rank."""
    process = launch("orphan", "wait", prefix=CONTAINER)
    notes(tmp_path, 0, 1)
    (inner,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(1.0)
    children = Path(f"/proc/{inner}/task/{inner}/children").read_text().split()
    assert len(children) == 1  # the rank that waits; no zombie
    os.kill(int(inner), signal.SIGTERM)
    assert process.wait(60) == 75


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--nodes", "2"), "--nodes 2 needs --master-addr and --master-port"),
        (("--nodes", "2", "--node", "2"), "--node 2 must be from 0 to 1"),
        (("--ranks", "x"), "invalid int value: 'x'; see --help"),
        (("--rank", "2"), "see --help"),
    ],
)
def test_mistakes(launch, options, says):
    process = launch("0", options=options)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["MASTER_PORT", "JOB_COMPLETION_INDEX"])
def test_what_the_environment_says(launch, tmp_path, name):
    """A single machine is node 0 of itself; an empty port is none; a word is a mistake."""
    assert launch("0", env={"JOB_COMPLETION_INDEX": "3"}).wait(60) == 0
    assert notes(tmp_path, 0)[0][0] == "0"
    assert launch("0", env={name: ""}).wait(60) == 0
    options = ("--nodes", "2", "--master-addr", "h")
    process = launch("0", options=options, env={"MASTER_PORT": "4000"} | {name: "x"})
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        1,
        f"error: {name}='x' is not a number: set it to one, or unset it\n",
    )


def test_a_script_that_is_not_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pmp_ds.launch", "--ranks", "1", tmp_path / "no"],
        capture_output=True,
        text=True,
        cwd=REPO,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        1,
        f"error: {tmp_path / 'no'}: no such file\n",
    )


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("export", "--help"), 0, "usage: pmp-ds export"),
        (("pmp-ds", "--version"), 0, __version__),
        (("exprt",), 1, "unknown command exprt (did you mean export?)"),
        (("--ranks", "2", "export"), 1, "error: export is one process: omit --ranks and --nodes"),
        (("--nodes", "2", "audit"), 1, "error: audit is one process: omit --ranks and --nodes"),
    ],
)
def test_other_commands_are_one_process(words, code, says):
    """As `docker run IMAGE export ...` starts them."""
    done = subprocess.run(
        [sys.executable, "-m", "pmp_ds.launch", *words],
        capture_output=True,
        text=True,
        cwd=REPO,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == code
    assert says in (done.stderr if code else done.stdout)
