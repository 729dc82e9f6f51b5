"""Processes that begin in a moment: forked from one that has imported torch and the rest.

    one = Fork(main, "argument", env={"RANK": "0"})     # sys.exit(main("argument"))
    assert one.line() == "ready\n"
    code, out, err = one.end()

    done = command("pretrain.py", "--config", "a.yaml", cwd=folder, ranks=2)   # as commands.run

For tests of what a process says, of its signals and of its exit code. Those of its start need a
fresh interpreter: subprocess, or tests/helpers/commands.py.
"""

import atexit
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from pmp_ds.errors import exit_code
from tests.helpers.commands import LAUNCHER, Done
from tests.helpers.distributed import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.helpers.forks_imports"])
_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # as every command sets it before it imports torch
}
"""The forkserver starts with the first process and hands its environment on."""


class Fork:
    """Run ``main(*args)``, a top-level function, in a process of its own; what it returns is the
    exit code."""

    def __init__(self, main: Callable[..., int], *args: Any, env: Mapping[str, str]) -> None:
        self._outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._seen = [0, 0]
        reader, self._input = os.pipe()
        theirs = [Connection(os.dup(file.fileno())) for file in self._outputs]
        theirs.insert(0, Connection(reader))  # multiprocessing passes on what a Connection holds
        self._process = _CONTEXT.Process(target=_begin, args=(theirs, main, args, dict(env)))
        self._process.daemon = True
        with mock.patch.dict(os.environ, _ENVIRONMENT):
            self._process.start()
        for end in theirs:
            end.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def line(self) -> str:
        """Wait for a line of its standard output, or for its end."""
        text = ""
        while not text.endswith("\n"):
            ended = not self._process.is_alive()
            text += self._read(0)
            if ended:
                break
            time.sleep(0.005)
        return text

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """Return the exit code, -N for signal N."""
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"no end after {timeout} s: {self._read(0)}{self._read(1)}"
        return code

    def end(self, timeout: float = 90) -> tuple[int, str, str]:
        """Close its standard input; return its exit code and what else it wrote."""
        self._close_input()
        return self.wait(timeout), self._read(0), self._read(1)

    def close(self) -> None:
        """Kill it, if it still runs."""
        self._close_input()
        if self._process.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        self._process.join()
        for file in self._outputs:
            file.close()

    def _read(self, output: int) -> str:
        """Return what was written since the last call."""
        file = self._outputs[output].fileno()
        found = os.pread(file, os.fstat(file).st_size - self._seen[output], self._seen[output])
        self._seen[output] += len(found)
        return found.decode()

    def _close_input(self) -> None:
        if self._input >= 0:
            os.close(self._input)
            self._input = -1


def _begin(
    files: list[Connection], main: Callable[..., int], args: tuple[Any, ...], env: dict[str, str]
) -> None:
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
        file.close()
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ.update(env)
    try:
        sys.exit(main(*args))
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends with os._exit


def command(
    launcher: str, *arguments: str | Path, cwd: Path, ranks: int = 1, timeout: float = 240
) -> Done:
    """Run ``launcher`` with ``arguments`` to its end, its ranks as any launcher would start them.
    The exit code is rank 0's; the outputs are those of all ranks, one after the other."""
    argv, port = [str(LAUNCHER / launcher), *map(str, arguments)], str(free_port())
    forks = []
    for rank in range(ranks):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        where |= {"LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        forks.append(Fork(_command, argv, str(cwd), env=where if ranks > 1 else {}))
    try:
        ends = [fork.end(timeout) for fork in forks]
    finally:
        for fork in forks:
            fork.close()
    out, err = ("".join(texts) for texts in zip(*((out, err) for _, out, err in ends), strict=True))
    return Done(argv, ends[0][0], out, err)


def _command(argv: list[str], cwd: str) -> int:
    """Do what the file ``argv[0]`` does."""
    os.chdir(cwd)
    sys.argv = argv
    module = importlib.import_module(f"pmp_ds.commands.{Path(argv[0]).stem}")
    code: int = module.command() if hasattr(module, "command") else exit_code(module.main)
    return code
