"""Run a function on several ranks, each a process of its own (gloo on CPU).

    results = run_ranks(2, check_something, arg)        # fresh processes: 5 to 10 s of imports
    results = ranks2.run(check_something, arg)          # fixture of conftest.py: kept processes

``check_something`` is a top-level function (or ``"package.module:function"``) that takes the
arguments and returns something picklable; the results come back in rank order. When a rank raises
or dies, or the time is up, every rank is killed and ``RankError`` shows each rank's traceback and
output. An error that a test expects must be caught inside the function. Kept processes keep
their state (seeds, caches): a function sets the state it relies on. Between calls they are
suspended, because every process group that they ever made has polling gloo threads.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import IO, Any

REPO = Path(__file__).resolve().parents[2]
INIT = "pmp_ds.dist:init"
GRACE_SECONDS = 2.0  # after the first failure, for the other ranks to report theirs
OUTPUT_BYTES = 8000  # of each rank's output shown in an error

Target = str | Callable[..., Any]


class RankError(AssertionError):
    """Report that some rank failed; ``tracebacks`` has those of the ranks that reported one."""

    def __init__(self, message: str, tracebacks: dict[int, str]) -> None:
        super().__init__(message)
        self.tracebacks = tracebacks


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    pipe: Connection
    output: IO[bytes]
    seen: int = 0  # bytes of output that belong to earlier calls

    def tail(self) -> str:
        file = self.output.fileno()
        start = max(self.seen, os.fstat(file).st_size - OUTPUT_BYTES)
        return os.pread(file, OUTPUT_BYTES, start).decode(errors="replace").strip()


class RankPool:
    """Keep ``world_size`` ranks alive between calls; the first ``run`` starts them.

    ``init`` is called once in each rank before the first function: by default
    ``pmp_ds.dist.init()``, ``None`` for no process group. ``env`` is added to the ranks'
    environment; a value of ``None`` removes a variable. ``worker`` is the module that each process
    runs. After a failure the next ``run`` starts new processes, so one failing test does not fail
    the others.
    """

    def __init__(
        self,
        world_size: int,
        *,
        init: Target | None = INIT,
        env: Mapping[str, str | None] | None = None,
        start_timeout: float = 180.0,
        worker: str = "tests.helpers.rank_worker",
    ) -> None:
        self.world_size = world_size
        self.init = None if init is None else _name(init)
        self.env = dict(env or {})
        self.start_timeout, self.worker = start_timeout, worker
        self._ranks: list[_Rank] = []

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the live ranks; empty before the first run and after a
        failure."""
        return [rank.process.pid for rank in self._ranks]

    def run(self, target: Target, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``target(*args)`` on every rank and return the results in rank order."""
        request = pickle.dumps((_name(target), args))
        if not self._ranks:
            self._start()
        self._signal(signal.SIGCONT)
        results = self._call(request, _name(target), timeout)
        self._signal(signal.SIGSTOP)
        return results

    def _signal(self, number: int) -> None:
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, number)

    def close(self) -> None:
        """Kill the ranks and everything they started."""
        self._signal(signal.SIGKILL)
        for rank in self._ranks:
            rank.process.wait()
            rank.pipe.close()
            rank.output.close()
        self._ranks = []

    def _start(self) -> None:
        port = free_port()
        for index in range(self.world_size):
            ours, theirs = Pipe()
            output = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
            process = subprocess.Popen(
                [sys.executable, "-m", self.worker, str(theirs.fileno())],
                cwd=REPO,
                env=self._environment(index, port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # its own process group: one signal ends its children too
            )
            theirs.close()
            self._ranks.append(_Rank(process, ours, output))
        self._call(pickle.dumps((self.init, ())), "start", self.start_timeout)

    def _environment(self, index: int, port: int) -> dict[str, str]:
        values = {
            "RANK": index,
            "LOCAL_RANK": index,
            "WORLD_SIZE": self.world_size,
            "LOCAL_SIZE": self.world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",  # needs no host name that resolves
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": 1,
            # deepspeed and ninja
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONUNBUFFERED": 1,
        }
        merged = {**os.environ, **{name: str(value) for name, value in values.items()}, **self.env}
        return {name: value for name, value in merged.items() if value is not None}

    def _call(self, request: bytes, name: str, timeout: float) -> list[Any]:
        for rank in self._ranks:
            rank.seen = os.fstat(rank.output.fileno()).st_size
        try:
            for rank in self._ranks:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # told below
                    rank.pipe.send_bytes(request)
            return self._collect(name, timeout)
        except BaseException:  # an interrupt or pytest's own time-out as well
            self.close()
            raise

    def _collect(self, name: str, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        tracebacks: dict[int, str] = {}
        died: dict[int, str] = {}
        waiting = {rank.pipe: index for index, rank in enumerate(self._ranks)}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), timeout=left):
                assert isinstance(pipe, Connection)
                index = waiting.pop(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    code = self._ranks[index].process.wait(timeout=10)
                    died[index] = f"died with exit code {code}"
                else:
                    (results if ok else tracebacks)[index] = value
            if tracebacks or died:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not (waiting or tracebacks or died):
            return [results[index] for index in range(self.world_size)]

        self._dump_stacks(waiting.values())
        failed = ", ".join(str(index) for index in sorted(tracebacks.keys() | died.keys()))
        what = f"failed on rank {failed}" if failed else "ran out of time"
        parts = [f"{name} {what} of {self.world_size} (limit {timeout:g} s)"]
        states = dict.fromkeys(range(self.world_size), "finished")
        states |= dict.fromkeys(waiting.values(), "was still running and was killed")
        states |= {index: f"raised\n{text.rstrip()}" for index, text in tracebacks.items()}
        for index, rank in enumerate(self._ranks):
            parts.append(f"--- rank {index} {(states | died)[index]}")
            if output := rank.tail():
                parts.append(f"--- output of rank {index}\n{output}")
        raise RankError("\n".join(parts), tracebacks)

    def _dump_stacks(self, indices: Collection[int]) -> None:
        """Make hanging ranks write their stacks into their output (see rank_worker)."""
        for index in indices:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._ranks[index].process.pid, signal.SIGUSR1)
        if indices:
            time.sleep(0.5)


def run_ranks(
    world_size: int,
    target: Target,
    *args: Any,
    timeout: float = 120.0,
    env: Mapping[str, str | None] | None = None,
    init: Target | None = INIT,
) -> list[Any]:
    """Call ``target(*args)`` on ``world_size`` fresh ranks and return the results in rank order."""
    with RankPool(world_size, init=init, env=env) as pool:
        return pool.run(target, *args, timeout=timeout)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _name(target: Target) -> str:
    if isinstance(target, str):
        return target
    name = f"{target.__module__}:{target.__qualname__}"
    if "<" in name or target.__module__ == "__main__":
        raise ValueError(f"{name} cannot be found by another process: use a top-level function")
    return name
