"""Run the project's commands as their users do.

    done = run("prepare_data.py", "--out", "store", cwd=tmp_path)     # python launcher/...
    done = run("pretrain.py", "--config", "a.yaml", cwd=tmp_path, ranks=2)     # under deepspeed
    ok(done)             # or error_of(done): the one line of a mistake
    done = call("export.py", "--run", "x", cwd=tmp_path)      # the same without a process, one rank

Each command is a session of its own, so that a time-out or ``kill`` ends its children too.
"""

import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

from pmp_ds.errors import exit_code
from tests.helpers.distributed import REPO, free_port

LAUNCHER, RECIPES, DS_CONFIGS = REPO / "launcher", REPO / "launcher/recipes", REPO / "ds_configs"
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")

Done = subprocess.CompletedProcess[str]


def run(
    launcher: str,
    *arguments: str | Path,
    cwd: Path,
    ranks: int | None = None,
    timeout: float = 240,
    env: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
) -> Done:
    """Run ``launcher`` with ``arguments`` to its end: plain python, or ``ranks`` CPU ranks."""
    process = start(launcher, *arguments, cwd=cwd, ranks=ranks, env=env, before=before)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        kill(process)
        out, err = process.communicate()
        error.add_note(f"{process.args!r}\n{out}\n{err}")
        raise
    return Done(process.args, process.returncode, out, err)


def call(launcher: str, *arguments: str | Path, cwd: Path) -> Done:
    """Run ``launcher`` in this process, as one rank: for refused or quick commands. ``run`` starts
    real processes."""
    module = importlib.import_module(f"pmp_ds.commands.{launcher.removesuffix('.py')}")
    argv = [str(LAUNCHER / launcher), *map(str, arguments)]
    main = module.main if hasattr(module, "main") else lambda: module.prepare().run()
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = exit_code(main)
        except SystemExit as end:  # raised by --help
            code = int(end.code or 0)
    return Done(argv, code, out.getvalue(), err.getvalue())


def start(
    launcher: str,
    *arguments: str | Path,
    cwd: Path,
    ranks: int | None = None,
    env: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    port: int | None = 0,
) -> subprocess.Popen[str]:
    """Start a command as ``run`` does, without waiting for its end. ``env`` is added to the
    environment; ``before`` is put in front of the command. ``port`` of the ranks: 0 takes a free
    one, None passes no port to the launcher."""
    command = [sys.executable]
    if ranks is not None:
        deepspeed = Path(sys.executable).with_name("deepspeed")
        command = [str(deepspeed), "--num_accelerators", str(ranks)]
        if port is not None:
            command += ["--master_port", str(port or free_port())]
    return spawn(*before, *command, LAUNCHER / launcher, *arguments, cwd=cwd, env=env)


def spawn(
    *command: str | Path, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start any program in the environment of the commands."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=_environment() | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to the command and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def kill_when(
    process: subprocess.Popen[str], condition: Callable[[], bool], timeout: float = 120
) -> None:
    """Wait for ``condition``, then send SIGKILL; fail if the command ends earlier."""
    deadline = time.monotonic() + timeout
    try:
        while not condition():
            assert process.poll() is None, f"it ended too early:\n{process.communicate()}"
            assert time.monotonic() < deadline, f"the moment did not come within {timeout} s"
            time.sleep(0.005)
        assert process.poll() is None, "it ended too early"
    finally:
        kill(process)
        process.communicate()


def ok(done: Done) -> Done:
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


def error_of(done: Done) -> str:
    """Return the message of a refused command: exit code 1, printed once, without a traceback. Its
    continuation lines are indented."""
    both = done.stdout + done.stderr
    assert done.returncode == 1, f"exit code {done.returncode}:\n{both}"
    assert "Traceback" not in both, both
    found = re.findall(r"^error: .*(?:\n  .*)*", done.stderr, re.MULTILINE)
    assert len(found) == both.count("error: ") == 1, both
    return str(found[0])


def files_of(*folders: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file below, and every folder, to detect any change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (0, 0)
        for folder in folders
        for path in [folder, *folder.rglob("*")]
        if path.exists()
    }


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    return environment | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(REPO),  # the launchers must work where the package is not installed
    }
