"""The C++ operators of the masked update (contract: ``Kernels``).

They are compiled at first use and kept in the user's cache. They are plain C functions without
torch's headers, so compiling takes a second and needs no Python headers. Without a C++ compiler
``library`` is None, and the torch reference in masked_adamw.py is used. A container image compiles
them next to the source when it is built, and then needs no compiler:

    python -c 'from pmp_ds.optim.kernels import compiler; compiler.compile_beside_source()'
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import warnings
from pathlib import Path

from pmp_ds import account
from pmp_ds.errors import UserError
from pmp_ds.run_dir import atomic_path

SOURCE = Path(__file__).with_name("masked_adamw.cpp")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",  # round every operation separately, as the reference does
    "-fno-math-errno",  # sqrt becomes a vector instruction, and is still correctly rounded
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled operators, or None, with one warning, when they are unavailable."""
    if not SOURCE.is_file():
        _warn(f"{SOURCE} is missing: this installation of pmp_ds is incomplete; reinstall it")
        return None
    try:
        path = _prebuilt() if _prebuilt().exists() else _compiled()
    except UserError as error:
        _warn(str(error))
        return None
    except subprocess.CalledProcessError as error:
        _warn(f"{error.cmd[0]} failed: {error.stderr.strip()[:500]}")
        return None
    except OSError as error:
        _warn(f"the C++ operators could not be compiled: {error}")
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        _warn(
            f"{path} cannot be loaded: {error} (if its folder is mounted noexec, set "
            "XDG_CACHE_HOME to a folder that is not)"
        )
        return None
    loaded.pmp_block.restype = ctypes.c_int64
    return loaded


def compile_beside_source() -> Path:
    """Compile into the package, where every user finds it, and return the file."""
    _compile(_compiler(), _prebuilt())
    return _prebuilt()


def _warn(reason: str) -> None:
    warnings.warn(
        f"the masked optimizer runs in torch operations, many times slower on CPU: {reason}",
        stacklevel=3,
    )


def _compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        raise UserError("no C++ compiler was found (on Debian or Ubuntu: apt install g++)")
    return found


def _prebuilt() -> Path:
    """Return where an image has the library: beside the source, compiled from this very source. A
    user with write access there can change this program anyway."""
    return SOURCE.with_name(_name())


def _name(compiler_version: str = "") -> str:
    """Return the file name for this source, machine type and compiler."""
    recipe = [SOURCE.read_text(), *FLAGS, compiler_version, platform.machine()]
    digest = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
    return f"masked_adamw-{digest}.so"


def _compiled() -> Path:
    """Return the shared library: from the user's cache, or newly compiled."""
    compiler = _compiler()
    version = [compiler, "--version"]
    name = _name(subprocess.run(version, capture_output=True, text=True, check=True).stdout)
    try:
        return _cached(compiler, _private_cache() / name)
    except OSError:  # a container's home is often read-only
        return _cached(compiler, account.temporary_folder() / name)


def _cached(compiler: str, path: Path) -> Path:
    """Return ``path``, compiled unless this user compiled it before; a file that another user may
    have written is never loaded."""
    if not (path.exists() and account.is_safe_program(path)):
        _compile(compiler, path)
    return path


def _private_cache() -> Path:
    """Return the user's cache, with mode 0700 whatever the umask. Raises OSError when it belongs to
    another user or is a link."""
    cache = _user_cache()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = cache.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{cache} is not a folder of this user")
    if found.st_mode & 0o077:
        cache.chmod(0o700)
        for file in cache.glob("*.so") if found.st_mode & 0o022 else ():
            file.unlink(missing_ok=True)  # others had write access
    return cache


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "pmp_ds"


def _compile(compiler: str, path: Path) -> None:
    """Compile to a temporary file and rename it, so that many processes may do this at once."""
    with atomic_path(path) as temporary:
        subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(temporary)],
            capture_output=True,
            text=True,
            check=True,
        )
        temporary.chmod(0o755)  # whatever the umask and the linker did
