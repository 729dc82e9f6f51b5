"""A real SLURM of one controller and two nodes, on the hosts of tests/helpers/hosts.py.

    with hosts.two() as pair, slurm.cluster(pair, folder) as cluster:
        job = cluster.submit("job.sh", "--ntasks-per-node=1", cwd=work)
        cluster.wait(job, "COMPLETED")

Everything is in ``folder``, munge's key and socket included. Each node says that it has 8 GPUs, so
that scripts that ask for GPUs are accepted. No systemd, and no cgroups.
"""

import contextlib
import os
import re
import secrets
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.hosts import CONTROL, HOSTS, Pair

_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIG = """\
ClusterName=pmp
SlurmctldHost=ctl({control})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ReturnToService=2
KillWait=30
JobRequeue=1
SlurmdTimeout=20
PropagateResourceLimits=NONE
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=10
"""
_NODE = (
    "NodeName={host} NodeAddr={address} CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 "
    "ThreadsPerCore=1 RealMemory=4000 Gres=gpu:8 State=UNKNOWN"
)


@dataclass(frozen=True)
class Cluster:
    """Hold a running SLURM."""

    pair: Pair
    folder: Path

    def ask(self, *command: str, cwd: Path | None = None) -> str:
        """Run a client command on the controller and return what it prints."""
        done = subprocess.run(
            [*self.pair.on("ctl"), *command],
            env=_environment(self.folder),
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, script: str, *options: str, cwd: Path) -> str:
        """Submit a script and return the job's number."""
        return self.ask("sbatch", "--parsable", *options, script, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what `scontrol show job` says, by name."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", number)))

    def wait(self, number: str, *states: str, restarts: int | None = None, limit=240) -> None:
        """Wait until the job is in one of ``states``, after ``restarts`` restarts if given."""
        deadline = time.monotonic() + limit
        while True:
            found = self.job(number)
            if found["JobState"] in states and restarts in (None, int(found["Restarts"])):
                return
            assert time.monotonic() < deadline, f"{states}, {restarts} restarts: not so: {found}"
            time.sleep(0.2)

    def start_again(self, number: str, restarts: int) -> None:
        """Wait until a job was requeued and has no process left; start it without the two minutes
        that SLURM waits first."""
        self.wait(number, "PENDING", restarts=restarts)
        time.sleep(2.0)  # credentials of the second in which it ended are revoked: it would fail
        self.ask("scontrol", "update", f"jobid={number}", "starttime=now")


@contextlib.contextmanager
def cluster(pair: Pair, folder: Path) -> Iterator[Cluster]:
    """Start the daemons and stop them at the end; wait until both nodes are idle."""
    _write(folder)
    with contextlib.ExitStack() as stack:
        munge = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key"]
        munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
        stack.enter_context(_daemon([*munge, f"--socket={folder}/munge.socket"], folder))
        stack.enter_context(_daemon([*pair.on("ctl"), "slurmctld", "-D"], folder))
        for host in HOSTS:
            stack.enter_context(_daemon([*pair.on(host), "slurmd", "-D", "-N", host], folder))
        found = Cluster(pair, folder)
        deadline = time.monotonic() + 60
        while "idle|2" not in _try(found, "sinfo", "-h", "-p", "main", "-o", "%T|%D"):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.3)
        yield found


def _write(folder: Path) -> None:
    folder.chmod(0o755)  # munge wants others to reach its socket
    for name in ("state", *(f"spool-{host}" for host in HOSTS)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o600)
    nodes = [_NODE.format(host=host, address=address) for host, address in HOSTS.items()]
    text = CONFIG.format(folder=folder, control=CONTROL["ctl"], nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(text)
    (folder / "gpu").mkdir()
    for number in range(8):  # slurmd counts device files: these are /dev/null's kind
        os.mknod(folder / "gpu" / str(number), stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu/[0-7]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # or slurmd looks for one


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return kept | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": _PATH}


@contextlib.contextmanager
def _daemon(command: Sequence[str], folder: Path) -> Iterator[None]:
    log = folder / "daemons.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        time.sleep(0.5)
        assert process.poll() is None, f"{command} ended:\n{log.read_text()}"
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _try(found: Cluster, *command: str) -> str:
    """Return what a client says, nothing while the controller does not answer."""
    with contextlib.suppress(AssertionError):
        return found.ask(*command)
    return ""
