"""Compile the pretend device, once for a user, a compiler and a torch; before any process loads it.

program()    # the compiled device; raises Unavailable
"""

import functools
import hashlib
import subprocess
from pathlib import Path

import torch

from pmp_ds import account
from pmp_ds.optim.kernels import compiler
from pmp_ds.run_dir import atomic_path

FOLDER = Path(__file__).parent
FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC")


class Unavailable(Exception):
    """Why there can be no pretend device here, in one line."""


@functools.cache
def program() -> Path:
    """Return the compiled device: from the user's cache, or compiled there in half a minute."""
    if torch.version.cuda or torch.version.hip:
        raise Unavailable("the pretend CUDA device needs a CPU build of torch")
    command = compiler._compiler()
    if command is None:
        raise Unavailable("the pretend CUDA device needs a C++ compiler, and there is none")
    torch_folder = Path(torch.__file__).parent
    try:
        cache = compiler._private_cache()
    except OSError:  # as for the operators of the masked update: a container's home is read-only
        cache = account.temporary_folder()
    path = cache / f"pretend-{_digest(command, torch_folder)}.so"
    if not (path.exists() and account.is_safe_program(path)):
        _compile(command, torch_folder, path)
    return path


def _digest(command: str, torch_folder: Path) -> str:
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    sources = [file.read_text() for file in sorted(FOLDER.glob("*.[hc]*")) if file.suffix != ".py"]
    recipe = [*sources, *FLAGS, version.stdout, torch.__version__, str(torch_folder)]
    return hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]


def _compile(command: str, torch_folder: Path, path: Path) -> None:
    include, libraries = torch_folder / "include", torch_folder / "lib"
    with atomic_path(path) as temporary:
        result = subprocess.run(
            [
                command,
                *FLAGS,
                f"-I{include}",
                f"-I{include / 'torch/csrc/api/include'}",
                str(FOLDER / "device.cpp"),
                "-o",
                str(temporary),
                f"-L{libraries}",
                "-Wl,--no-as-needed",
                "-ltorch_cpu",
                "-lc10",
                f"-Wl,-rpath,{libraries}",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{command} failed:\n{result.stderr[:3000]}"
        temporary.chmod(0o755)
