"""Which rank this process is, and where the ranks of its job meet: from whatever started it.

`deepspeed`, `torchrun` and `pmp_ds.launch` say it in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
`srun` and `mpirun` say it in words of their own, and without an address: ``adopt`` translates. A
process that one of them started as one of several never runs as if it were alone.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pmp_ds.errors import UserError

DEFAULT_PORT = "29500"
"""What launchers take unless they are told: two jobs on one machine would share it."""

_LAUNCHERS = ("deepspeed.launcher.launch", "torch.distributed.run", "torchrun", "pmp_ds.launch")
_JOB_IDS = {"SLURM_JOB_ID": "SLURM job", "PBS_JOBID": "PBS job", "LSB_JOBID": "LSF job"}


@dataclass(frozen=True)
class _Starter:
    """How a launcher that does not speak of RANK names the same things."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str


# MPI's first: its ranks inherit what SLURM says of the batch script that started them.
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
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where this process is one of
    several and its launcher left them out. Raises UserError where they cannot be derived."""
    if "RANK" in os.environ:
        if os.environ.get("MASTER_PORT") == DEFAULT_PORT and os.environ.get("CROSS_SIZE") == "1":
            # Of `deepspeed` on one machine without --master_port.
            launcher = launch_id()
            if launcher is not None:
                os.environ["MASTER_PORT"] = str(derived_port(launcher))
        return
    several = [s for s in _STARTERS if int(os.environ.get(s.world_size) or "1") > 1]
    whole = [s for s in several if s.rank in os.environ and s.local_rank in os.environ]
    if several:  # `srun --mpi=pmi2` speaks two languages, and one of them whole
        _adopt_from((whole or several)[0])


def _adopt_from(starter: _Starter) -> None:
    given = os.environ
    missing = [n for n in (starter.rank, starter.local_rank) if n not in given]
    if missing:
        raise UserError(
            f"{starter.world_size}={given[starter.world_size]} says that this is one of several "
            f"ranks, and {missing[0]} is not set: start the ranks with {starter.name}, or set "
            "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
        )
    if starter.name == "srun" and "SLURM_JOB_ID" in given and "SLURM_STEP_ID" not in given:
        raise UserError(
            f"SLURM_NTASKS={given['SLURM_NTASKS']} and this process runs in the batch script "
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
    """The host of rank 0."""
    if starter.name == "srun":
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
        if nodes:
            return first_host(nodes)
    elif os.environ.get(starter.local_size) == os.environ[starter.world_size]:
        return "127.0.0.1"
    raise UserError(
        f"{starter.name} started {os.environ[starter.world_size]} ranks, and the host of rank 0 "
        "cannot be told from the environment: set MASTER_ADDR to it for every rank"
    )


def _job(starter: _Starter) -> list[str]:
    """What all ranks of this start share and no other start has."""
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
    """`gpu-003` of SLURM's `gpu-[003-004,7],big1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # it may match nothing
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def derived_port(job: Iterable[object]) -> int:
    """A port that the ranks of ``job`` agree on without talking: below those that systems hand
    out by themselves."""
    digest = hashlib.sha256("\0".join(map(str, job)).encode()).digest()
    return 20000 + int.from_bytes(digest[:4], "big") % 9500


def launch_id() -> tuple[object, ...] | None:
    """The same for all ranks that one launcher process started, and for no other's; None where
    there is none above this process."""
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
    """When a process started, in ticks since its machine did: with ``pid`` it is one process, also
    after the clock was set. Raises OSError for one that is gone."""
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[19])


def is_launcher(command: list[str]) -> bool:
    """Whether a command line starts the ranks of a machine."""
    words = command[:4]
    return any(word.rpartition("/")[2] in _LAUNCHERS for word in words)


def job_in_words() -> str:
    """`SLURM job 17`; empty outside a scheduler."""
    return next((f"{w} {os.environ[n]}" for n, w in _JOB_IDS.items() if os.environ.get(n)), "")
