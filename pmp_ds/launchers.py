"""Find this process's rank, and where the ranks of its job meet, under any launcher.

`deepspeed`, `torchrun` and `pmp_ds.launch` set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
`srun` and `mpirun` use variables of their own, without an address: ``adopt`` translates them. A
process that was started as one of several never runs alone by mistake.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pmp_ds.errors import UserError, require

DEFAULT_PORT = "29500"
"""The default port of launchers, which two jobs on one machine would share."""

_LAUNCHERS = ("deepspeed.launcher.launch", "torch.distributed.run", "torchrun", "pmp_ds.launch")
_JOB_IDS = {"SLURM_JOB_ID": "SLURM job", "PBS_JOBID": "PBS job", "LSB_JOBID": "LSF job"}


@dataclass(frozen=True)
class _Starter:
    """A launcher's own names for RANK and the like."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str


# MPI first: its ranks inherit the SLURM variables of the batch script that started them.
_STARTERS = (
    _Starter(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Starter("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Starter("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
)


def adopt() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT if this process is one of
    several and its launcher did not. Raises UserError if they cannot be derived or used."""
    if "RANK" in os.environ:
        _check_given()
        if os.environ.get("MASTER_PORT") == DEFAULT_PORT and os.environ.get("CROSS_SIZE") == "1":
            # From `deepspeed` on one machine without --master_port.
            launcher = launch_id()
            if launcher is not None:
                os.environ["MASTER_PORT"] = str(derived_port(launcher))
        return
    several = [s for s in _STARTERS if os.environ.get(s.world_size) and number(s.world_size) > 1]
    whole = [s for s in several if s.rank in os.environ and s.local_rank in os.environ]
    if several:  # `srun --mpi=pmi2` sets both kinds of variables, but only one completely
        _adopt_from((whole or several)[0])


def _check_given() -> None:
    """Raise UserError unless RANK and its like, set by a launcher or by hand, can be used."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if name in os.environ:
            number(name)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        world = f"WORLD_SIZE={os.environ['WORLD_SIZE']}"
        require("MASTER_ADDR" in os.environ, f"{world}, but MASTER_ADDR, rank 0's host, is not set")
        require("MASTER_PORT" in os.environ, f"{world}, but MASTER_PORT, a free port, is not set")
        number("MASTER_PORT")


def number(name: str) -> int:
    """Return the number in an environment variable that is set. Raises UserError for other text."""
    text = os.environ[name]
    require(text.isdecimal(), f"{name}={text!r} is not a number: set it to one, or unset it")
    return int(text)


def _adopt_from(starter: _Starter) -> None:
    given = os.environ
    missing = [n for n in (starter.rank, starter.local_rank) if n not in given]
    if missing:
        raise UserError(
            f"{starter.world_size}={given[starter.world_size]} means that this is one of several "
            f"ranks, but {missing[0]} is not set: start the ranks with {starter.name}, or set "
            "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
        )
    if starter.name == "srun" and "SLURM_JOB_ID" in given and "SLURM_STEP_ID" not in given:
        raise UserError(
            f"SLURM_NTASKS={given['SLURM_NTASKS']}, but this process runs in the batch script "
            "itself: start the ranks with srun, or this one alone with RANK=0 WORLD_SIZE=1"
        )
    address = given.get("MASTER_ADDR") or _address(starter)
    port = given.get("MASTER_PORT") or str(derived_port(_job(starter)))
    os.environ.update(
        RANK=given[starter.rank],
        LOCAL_RANK=given[starter.local_rank],
        WORLD_SIZE=given[starter.world_size],
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )


def _address(starter: _Starter) -> str:
    """Return the host of rank 0."""
    if starter.name == "srun":
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
        if nodes:
            return first_host(nodes)
    elif os.environ.get(starter.local_size) == os.environ[starter.world_size]:
        return "127.0.0.1"
    raise UserError(
        f"{starter.name} started {os.environ[starter.world_size]} ranks, but the environment does "
        "not name the host of rank 0: set MASTER_ADDR to it for every rank"
    )


def _job(starter: _Starter) -> list[str]:
    """Return values that all ranks of this start share, and no other start has."""
    names = (
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT",
        "PMIX_NAMESPACE",
        "OMPI_MCA_ess_base_jobid",
    )
    found = [os.environ[name] for name in names if name in os.environ]
    return [starter.name, *(found or [str(os.getppid())])]


def first_host(nodes: str) -> str:
    """Return `gpu-003` for SLURM's `gpu-[003-004,7],big1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # it may match nothing
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def derived_port(job: Iterable[object]) -> int:
    """Return a port that the ranks of ``job`` agree on without communication, below the range that
    systems assign by themselves."""
    digest = hashlib.sha256("\0".join(map(str, job)).encode()).digest()
    return 20000 + int.from_bytes(digest[:4], "big") % 9500


def launch_id() -> tuple[object, ...] | None:
    """Return a value shared by exactly the ranks of one launcher process, or None without a
    launcher above this process."""
    process: psutil.Process | None = psutil.Process().parent()
    while process is not None:
        try:
            if is_launcher(process.cmdline()):
                return ("launcher", process.pid, start_ticks(process.pid))
            process = process.parent()
        except (psutil.Error, OSError):
            return None
    return None


def start_ticks(pid: int) -> int:
    """Return when a process started, in ticks since its machine did. With ``pid`` this identifies a
    process even after the clock was set. Raises OSError for a process that is gone."""
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[19])


def is_launcher(command: list[str]) -> bool:
    """Return whether a command line starts the ranks of a machine."""
    words = command[:4]
    return any(word.rpartition("/")[2] in _LAUNCHERS for word in words)


def job_in_words() -> str:
    """Return text such as `SLURM job 17`; empty outside a scheduler."""
    return next((f"{w} {os.environ[n]}" for n, w in _JOB_IDS.items() if os.environ.get(n)), "")
