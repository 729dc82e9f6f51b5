"""The virtual environment of each client, made once by the pip that runs here.

    python = install(client, Path(".clients"))

An environment is complete when its file `installed` matches the specification. Anything else comes
from an unfinished installation or an older list of packages, and is made again. The output of the
programs is in `.clients/NAME.log`.
"""

import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from tests.helpers.distributed import REPO

INSTALL_SECONDS = 3600  # of one call of pip: llama.cpp is compiled, in ten minutes on two cores
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # would mix another environment in
_CONVERTER = re.compile(
    r"[^/]+/vendor/(llama\.cpp/(?:convert_hf_to_gguf\.py|conversion/.*|gguf-py/gguf/.*))"
)


def _pinned(package: str) -> str:
    """Return ``package==version`` of constraints.txt."""
    text = (REPO / "constraints.txt").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith(f"{package}=="))


TORCH = _pinned("torch")
COMMON = (TORCH, "numpy", "sentencepiece", "protobuf")


@dataclass(frozen=True)
class Client:
    """Describe one row of the table."""

    name: str
    trial: str
    """Name of the test in trial.py."""

    packages: tuple[str, ...]
    shown: str
    """The package whose version is shown."""

    remove: tuple[str, ...] = ()
    """Packages that its installation brings and that do not fit torch for CPUs."""

    environment: Mapping[str, str] = field(default_factory=dict)
    converter: str = ""
    """The package whose sources contain llama.cpp's converter, which is in no wheel."""

    common: tuple[str, ...] = COMMON

    @property
    def slug(self) -> str:
        return re.sub(r"[^\w.]+", "-", self.name.lower())

    def place(self, home: Path) -> Path:
        return home / self.slug

    def log(self, home: Path) -> Path:
        return home / f"{self.slug}.log"


def ready(client: Client, home: Path) -> bool:
    """Return whether the environment matches the specification."""
    stamp, python = client.place(home) / "installed", client.place(home) / "bin/python"
    return (
        python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == _wanted(client)
    )


def install(client: Client, home: Path, *, torch_index: str = "") -> Path:
    """Return the python of the client's environment, made if need be.

    Raises:
        RuntimeError: it cannot be made; a line says why.
    """
    place = client.place(home)
    python = place / "bin/python"
    if ready(client, home):
        return python
    shutil.rmtree(place, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    with client.log(home).open("w", encoding="utf-8") as log:

        def pip(*arguments: str) -> None:
            command = [
                sys.executable,
                "-m",
                "pip",
                "--python",
                str(python),
                "--no-input",
                "--disable-pip-version-check",
                *arguments,
            ]
            call(client, home, command, log, seconds=INSTALL_SECONDS)

        venv = [sys.executable, "-m", "venv", "--without-pip", str(place)]
        call(client, home, venv, log, seconds=INSTALL_SECONDS)
        if torch_index and TORCH in client.common:
            pip("install", "--no-deps", "--index-url", torch_index, TORCH)
        pip("install", "--no-compile", "--progress-bar", "off", *client.common, *client.packages)
        if client.remove:
            pip("uninstall", "--yes", *client.remove)
        if client.converter:
            # Restricted to this package: otherwise its build tools would be compiled as well.
            source = ("--no-binary", re.split("[=<>]", client.converter)[0])
            pip("download", "--no-deps", *source, client.converter, "-d", str(place))
            _unpack_converter(place)
    (place / "installed").write_text(_wanted(client), encoding="utf-8")
    return python


def call(
    client: Client,
    home: Path,
    command: Sequence[str],
    log: TextIO,
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a program for a client, with what it says in ``log``; no process of it is left.

    Raises:
        RuntimeError: it failed or did not end; a line says how.
    """
    binaries = str(client.place(home).resolve() / "bin")
    given = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    given |= {"PYTHONNOUSERSITE": "1", **(environment or {}), **client.environment}
    given["PATH"] = os.pathsep.join((binaries, os.environ.get("PATH", os.defpath)))
    start = os.fstat(log.fileno()).st_size
    with subprocess.Popen(
        command,
        env=given,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    ) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end after {seconds:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code < 0:
        raise RuntimeError(f"killed by {signal.Signals(-code).name}")
    if code > 0:
        said = Path(log.name).read_bytes()[start:].decode("utf-8", errors="replace")
        raise RuntimeError(complaint(said))


def complaint(text: str) -> str:
    """Return the line of a program's output that explains its failure, without local paths."""
    lines = text.strip().splitlines() or ["it said nothing"]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return shown([*lines[-1:], *errors][-1].removeprefix("ERROR: "))


def shown(line: str) -> str:
    """Return a line for one cell of the table, without folders."""
    return re.sub(r"/[\w./-]*/", "", line).replace("|", "/")[:160]


def _wanted(client: Client) -> str:
    """Return the specification of the environment: other packages or another Python make a new
    one."""
    packages = " ".join((*client.common, *client.packages))
    return f"Python {platform.python_version()}: {packages}"


def _unpack_converter(place: Path) -> None:
    """Take llama.cpp's converter out of the sources of llama-cpp-python."""
    archive = next(place.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        for member in tar:
            if match := _CONVERTER.fullmatch(member.name):
                member.name = match[1]
                tar.extract(member, place, filter="data")
    archive.unlink()
