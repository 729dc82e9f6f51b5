"""The variables that a process takes from its launcher: no rank of several runs as if alone."""

import os
import subprocess
import sys
from unittest import mock

import pytest

from pmp_ds import launchers
from pmp_ds.errors import UserError
from tests.helpers.distributed import REPO

pytestmark = pytest.mark.processes

OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu-[003-004]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-h-1@1",
}
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}

GIVEN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}


@pytest.fixture
def adopt():
    """Call ``adopt`` in an environment of ``given`` only; return the resulting values of OURS."""

    def call(given: dict[str, str]) -> dict[str, str | None]:
        with mock.patch.dict(os.environ, given, clear=True):
            launchers.adopt()
            return {name: os.environ.get(name) for name in OURS}

    return call


def test_alone(adopt):
    assert set(adopt({}).values()) == {None}
    assert set(adopt({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).values()) == {None}


def test_srun_says_it_all(adopt):
    found = adopt(SRUN)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("3", "1", "4")
    assert found["MASTER_ADDR"] == "gpu-003"
    assert 20000 <= int(found["MASTER_PORT"] or 0) < 29500
    # The same for every rank, another one for another job and the next attempt.
    assert adopt(SRUN | {"SLURM_PROCID": "0"})["MASTER_PORT"] == found["MASTER_PORT"]
    for other in ({"SLURM_JOB_ID": "18"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"}):
        assert adopt(SRUN | other)["MASTER_PORT"] != found["MASTER_PORT"]


def test_what_is_given_stays(adopt):
    found = adopt(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "4000"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("head", "4000")
    whole = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"}
    assert adopt(SRUN | whole)["WORLD_SIZE"] == "1"


@pytest.mark.parametrize("given", [MPIRUN, HYDRA, SRUN | MPIRUN, SRUN | HYDRA])
def test_mpirun_on_one_host(adopt, given):
    """Under SLURM as well, whose words are then those of the batch script."""
    found = adopt(given)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("1", "1", "2")
    assert found["MASTER_ADDR"] == "127.0.0.1"


def test_srun_that_speaks_pmi(adopt):
    assert adopt(SRUN | {"PMI_SIZE": "4", "PMI_RANK": "3"})["MASTER_ADDR"] == "gpu-003"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (MPIRUN | {"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 ranks.*set MASTER_ADDR"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2 means that this is one of several ranks, but PMI_RANK is"),
        ({k: v for k, v in SRUN.items() if "STEP" not in k}, "in the batch script itself: .*srun"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS=2 means that .* SLURM_PROCID is not set: .*srun"),
        ({"SLURM_NTASKS": "two"}, "SLURM_NTASKS='two' is not a number"),
        ({"RANK": ""}, "RANK='' is not a number: set it to one, or unset it"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2, but MASTER_ADDR, rank 0's host, is not"),
        (GIVEN | {"MASTER_PORT": ""}, "MASTER_PORT='' is not a number"),
    ],
)
def test_what_cannot_be_told_is_refused(adopt, given, says):
    with pytest.raises(UserError, match=says):
        adopt(given)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--print_config"],
        pytest.param(["--dry-run"], marks=pytest.mark.nightly),
        ["--dry-run", "false"],
    ],
)
def test_questions_need_no_ranks(words):
    """As in a shell inside an allocation of several tasks; training is still refused there."""
    env = {n: v for n, v in os.environ.items() if not n.startswith("SLURM_")} | {
        "SLURM_NTASKS": "8"
    }
    command = [sys.executable, "-m", "pmp_ds.commands", "pretrain", "--config", "demo", *words]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)
    if "false" in words:
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) > 10


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("h1", "h1"),
        ("h[1-2]", "h1"),
        ("gpu-[003-004,7],big1", "gpu-003"),
        ("a,b", "a"),
        ("r[1,3]n[07-09]-x", "r1n07-x"),
        ("node-a.b.c,node-d", "node-a.b.c"),
    ],
)
def test_first_host(nodes, first):
    assert launchers.first_host(nodes) == first


PROGRAM = "from pmp_ds import launchers as l; import os; l.adopt(); print(os.getenv('MASTER_PORT'))"


def test_deepspeed_with_its_default_port(tmp_path):
    """Ranks of one launcher agree on a port, and those of another use another. A wrapper between
    launcher and rank changes nothing."""
    starter = tmp_path / "deepspeed.launcher.launch"  # is taken for the real one by its name
    starter.write_text(
        "import subprocess, sys\n"
        f"program = {PROGRAM!r}\n"
        "command = [sys.executable, '-c', program]\n"
        "subprocess.run(command, check=True)\n"
        "subprocess.run(['sh', '-c', '\"$0\" \"$@\"; true', *command], check=True)\n"
    )
    environment = os.environ | {
        "RANK": "0",
        "LOCAL_SIZE": "2",
        "WORLD_SIZE": "2",
        "CROSS_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "PYTHONPATH": str(REPO),
    }
    ports = []
    for _ in range(2):
        out = subprocess.run(
            [sys.executable, starter], capture_output=True, text=True, check=True, env=environment
        ).stdout.split()
        assert len(out) == 2
        assert out[0] == out[1] != "29500"
        ports.append(out[0])
    assert ports[0] != ports[1]


def test_start_ticks_tell_processes_apart():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert launchers.start_ticks(process.pid) >= launchers.start_ticks(os.getpid())
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(OSError, match="ended"):  # a zombie
        launchers.start_ticks(process.pid)
    process.wait()
    with pytest.raises(OSError, match="No such file"):
        launchers.start_ticks(process.pid)
