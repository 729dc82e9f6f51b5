"""Start the ranks of this machine, pass signals on, and end with their exit code.

    python -m pmp_ds.launch pretrain --config demo
    python -m pmp_ds.launch --ranks 2 finetune ...                   two CPU ranks
    python -m pmp_ds.launch launcher/pretrain.py ...                 the same, from a checkout
    python -m pmp_ds.launch export --run runs/demo                   one process, as `pmp-ds export`
    python -m pmp_ds.launch --nodes 4 --node 1 --master-addr HOST --master-port 29400 \\
        pretrain ...                                                 the second of four machines

Made for containers and job arrays, also as process 1: SIGTERM, SIGINT and SIGUSR1 reach every rank,
orphans are reaped, and the exit code informs a scheduler: 0 done, 1 a mistake, 70 a fault, 75
stopped and saved (docs/OPERATIONS.md). `torchrun` turns all codes but 0 into 1, and `deepspeed` as
process 1 is killed without telling its ranks. This is the image's entry point.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from pmp_ds import launchers, signals
from pmp_ds.errors import EXIT_FAULT, EXIT_MISTAKE, EXIT_REQUEUE, UserError, exit_code, require

END_SECONDS = 30.0
"""Seconds after a rank has failed: the others notice soon and end by themselves."""

SAVE_SECONDS = 600.0
"""Seconds after a rank was asked to stop and has saved: the others are about to follow."""

KILL_SECONDS = 10.0
"""Seconds between SIGTERM and SIGKILL for ranks that do not end."""

_ORDER = (EXIT_MISTAKE, EXIT_FAULT, EXIT_REQUEUE)  # priority among the codes of several ranks


_ON_RANKS = ("pretrain", "finetune", "doctor")
_ONE_PROCESS = ["-m", "pmp_ds.commands"]
"""How Python starts all other commands, which exist once however many GPUs there are."""


class Ranks:
    """The processes of this machine's ranks, by process id."""

    def __init__(self, commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> None:
        self.codes: list[int] = []
        """Exit codes in order of arrival, 128 + n after signal n."""
        self._alive: set[int] = set()
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._ended_by_us = False
        for command, environment in commands:
            process = subprocess.Popen(command, env=environment)
            process.returncode = 0  # ``wait`` reaps it, not its destructor
            with self._lock:
                self._alive.add(process.pid)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to each rank that still runs."""
        with self._lock:
            for pid in self._alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait(self) -> int:
        """Wait for all ranks, reap any other child, and return the ranks' common exit code."""
        threading.Thread(target=self._end_the_others, daemon=True).start()
        while self._alive:
            pid, status = os.waitpid(-1, 0)
            with self._lock:
                if pid not in self._alive:
                    continue  # an orphan, inherited by process 1
                self._alive.remove(pid)
            code = os.waitstatus_to_exitcode(status)
            code = code if code >= 0 else 128 - code
            if not self._ended_by_us:
                self.codes.append(code)
            if code:
                self._failed.set()
        known = [code for code in _ORDER if code in self.codes]
        return known[0] if known else next((code for code in self.codes if code), 0)

    def _end_the_others(self) -> None:
        self._failed.wait()
        first = next(code for code in self.codes if code)
        limit = SAVE_SECONDS if first == EXIT_REQUEUE else END_SECONDS
        for number, seconds in ((signal.SIGTERM, limit), (signal.SIGKILL, KILL_SECONDS)):
            time.sleep(seconds)  # the process ends earlier if all ranks have
            self._ended_by_us = True
            signals.tell(f"a rank ended with code {first}, others did not: sending {number.name}")
            self.send(number)


def environments(
    ranks: int, nodes: int, node: int, address: str, port: int
) -> list[dict[str, str]]:
    """Return the environment variables of each rank of this machine."""
    of_all = {
        "WORLD_SIZE": nodes * ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "LOCAL_SIZE": ranks,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    found = []
    for local in range(ranks):
        values = of_all | {"RANK": node * ranks + local, "LOCAL_RANK": local}
        found.append({**os.environ, **{name: str(value) for name, value in values.items()}})
    return found


def num_gpus() -> int:
    """Return the number of GPUs that torch sees, asked in another process to keep torch out."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    program = "import torch; print(torch.cuda.device_count())"
    asked = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    return int(asked.stdout) if asked.returncode == 0 else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m pmp_ds.launch",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=int, help="ranks of this machine. Default: its GPUs, or 1")
    add("--nodes", type=int, default=1, help="machines. Default: 1")
    add(
        "--node",
        type=int,
        help="which of several this one is, from 0. Default: JOB_COMPLETION_INDEX of Kubernetes",
    )
    add("--master-addr", help="of several: the host of node 0. Default: MASTER_ADDR")
    add("--master-port", type=int, help="where they meet. Default: MASTER_PORT, or a free port")
    add(
        "command",
        help="pretrain, finetune, doctor, a file such as launcher/pretrain.py; or another command",
    )
    add("arguments", nargs=argparse.REMAINDER, help="of the command")
    args = parser.parse_args(argv)
    if args.node is None:  # a single machine may be a task of an Indexed Job of its own
        args.node = (_from_environment("JOB_COMPLETION_INDEX") or 0) if args.nodes > 1 else 0
    return args


def _from_environment(name: str) -> int | None:
    """Return the number in an environment variable, None if it is not set or empty."""
    return launchers.number(name) if os.environ.get(name) else None


def run(argv: Sequence[str]) -> int:
    """Start the ranks as the arguments say and return their exit code."""
    args = _parse(argv)
    command = [*_command(args.command), *args.arguments]
    if command[2:4] == _ONE_PROCESS:
        require(
            not args.ranks and args.nodes == 1,
            f"{args.command} is one process: omit --ranks and --nodes",
        )
        return _run([(command, os.environ)])
    ranks = args.ranks or num_gpus() or 1
    require(ranks > 0, f"--ranks {args.ranks} must be positive")
    require(0 <= args.node < args.nodes, f"--node {args.node} must be from 0 to {args.nodes - 1}")
    address = args.master_addr or os.environ.get("MASTER_ADDR")
    port = args.master_port or _from_environment("MASTER_PORT") or 0
    if args.nodes == 1:
        address, port = address or "127.0.0.1", port or _free_port()
    require(
        bool(address and port),
        f"--nodes {args.nodes} needs --master-addr and --master-port: the host of node 0, and a "
        "free port there",
    )
    found = environments(ranks, args.nodes, args.node, str(address), port)
    return _run([(command, environment) for environment in found])


def _run(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> int:
    """Start processes, pass signals on to them, and return their exit code."""
    started: Ranks | None = None
    early: list[signal.Signals] = []

    def forward(number: signal.Signals) -> None:
        early.append(number)
        if started is not None:
            started.send(number)

    with signals.reacting(forward):
        started = Ranks(commands)
        if early:
            started.send(early[-1])
        return started.wait()


def _command(name: str) -> list[str]:
    """Return how Python starts a file, or one of our commands; a file takes precedence."""
    if os.path.isfile(name):
        return [sys.executable, "-u", name]
    if name in _ON_RANKS:
        return [sys.executable, "-u", "-m", f"pmp_ds.commands.{name}"]
    require("/" not in name and not name.endswith(".py"), f"{name}: no such file")
    return [sys.executable, "-u", *_ONE_PROCESS, *([] if name == "pmp-ds" else [name])]


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def main() -> None:
    raise SystemExit(run(sys.argv[1:]))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
