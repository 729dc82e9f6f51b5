"""The C++ operators of the masked update (contract: ``Kernels``).

They are compiled at first use and kept in the user's cache. They are plain C functions without
torch's headers, so compiling takes a second and needs no Python headers. Without a C++ compiler
``library`` is None, and the torch reference in masked_adamw.py is used. A container image compiles
them next to the source when it is built:

    python -c 'from pmp_ds.optim.kernels import cpu; cpu.compile_beside_source()'
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

import torch

from pmp_ds import account
from pmp_ds.errors import UserError
from pmp_ds.optim.kernels import checks
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


class Coefficients(ctypes.Structure):
    """The coefficients of one AdamW step, fp32."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            "decay",
            "beta1",
            "grad_weight",
            "beta2",
            "grad_sq_weight",
            "minus_step_size",
            "sqrt_correction2",
            "eps",
        )
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled operators, or None, with one warning, when they are unavailable."""
    if not SOURCE.is_file():
        _warn(f"{SOURCE} is missing: this installation of pmp_ds is incomplete; reinstall it")
        return None
    compiler = _compiler()
    if compiler is None:
        _warn("no C++ compiler was found (on Debian or Ubuntu: apt install g++)")
        return None
    try:
        path = _compiled(compiler)
    except subprocess.CalledProcessError as error:
        _warn(f"{compiler} failed: {error.stderr.strip()[:500]}")
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
    compiler = _compiler()
    if compiler is None:
        raise UserError("no C++ compiler was found (on Debian or Ubuntu: apt install g++)")
    path = SOURCE.with_name(_name(compiler))
    _compile(compiler, path)
    return path


def _warn(reason: str) -> None:
    warnings.warn(
        f"the masked optimizer runs in torch operations, many times slower on CPU: {reason}",
        stacklevel=3,
    )


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _name(compiler: str) -> str:
    """Return the file name for this source, compiler and machine type."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    recipe = [SOURCE.read_text(), *FLAGS, version, platform.machine()]
    digest = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
    return f"masked_adamw-{digest}.so"


def _compiled(compiler: str) -> Path:
    """Return the shared library: from the package, from the user's cache, or newly compiled."""
    name = _name(compiler)
    installed = SOURCE.with_name(name)
    if installed.exists():  # a user with write access here can change this program anyway
        return installed
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


def kept_before_blocks(bits: torch.Tensor, block: int) -> torch.Tensor:
    """Return the number of kept elements before each run of ``block`` elements, on the device of
    ``bits``, (ceil(8 * len(bits) / block),) int64."""
    checks.packed(bits, 0, bits.device)
    num_bytes = (bits.numel() * 8 + block - 1) // block * (block // 8)
    counts = torch.zeros(num_bytes, dtype=torch.uint8, device=bits.device)
    table = [byte.bit_count() for byte in range(256)]
    counts[: bits.numel()] = torch.tensor(table, dtype=torch.uint8, device=bits.device)[bits.int()]
    per_block = counts.view(-1, block // 8).sum(dim=1, dtype=torch.int64)
    return per_block.cumsum(0) - per_block


def block_prefix(bits: torch.Tensor) -> torch.Tensor:
    """Return the number of kept elements before each block of the operator."""
    return kept_before_blocks(bits, _block())


def masked_adamw(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    bits: torch.Tensor | None,
    prefix: torch.Tensor | None,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    coefficients: Coefficients,
) -> None:
    """Make one AdamW step on the kept elements, in place."""
    _check_on_cpu(weights)
    checks.step(
        weights,
        gradient,
        bits,
        prefix,
        {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq},
        weight_dtypes=(torch.float32,),
        gradient_dtypes=(torch.float32,),
        block=_block(),
    )
    _loaded().pmp_masked_adamw(
        _pointer(weights),
        _pointer(gradient),
        _pointer(bits),
        _pointer(prefix),
        ctypes.c_int64(weights.numel()),
        _pointer(exp_avg),
        _pointer(exp_avg_sq),
        ctypes.byref(coefficients),
        ctypes.c_int(torch.get_num_threads()),
    )


def has_compact_master(dtype: torch.dtype) -> bool:
    """Return True for bf16, which needs only integers, and for fp16 if the compiler has it."""
    return dtype == torch.bfloat16 or (dtype == torch.float16 and bool(_loaded().pmp_has_fp16()))


def masked_adamw_master(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    bits: torch.Tensor | None,
    prefix: torch.Tensor | None,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    coefficients: Coefficients,
    master: torch.Tensor,
    factor: float,
) -> None:
    """Make one AdamW step on the compact fp32 master, in place, with the gradient times ``factor``;
    the kept weights become the rounded master."""
    _check_on_cpu(weights)
    checks.step(
        weights,
        gradient,
        bits,
        prefix,
        {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq},
        weight_dtypes=checks.SIXTEEN_BIT,
        gradient_dtypes=(torch.float32, weights.dtype),
        block=_block(),
    )
    _loaded().pmp_masked_adamw_master(
        _pointer(weights),
        ctypes.c_int(weights.dtype == torch.float16),
        _pointer(gradient),
        ctypes.c_int(gradient.dtype == torch.float32),
        _pointer(bits),
        _pointer(prefix),
        ctypes.c_int64(weights.numel()),
        _pointer(master),
        _pointer(exp_avg),
        _pointer(exp_avg_sq),
        ctypes.c_float(factor),
        ctypes.byref(coefficients),
        ctypes.c_int(torch.get_num_threads()),
    )


def zero_complement(values: torch.Tensor, bits: torch.Tensor, start: int) -> None:
    """Zero each value i whose bit ``start + i`` is 0, in place."""
    _check_on_cpu(values)
    allowed = (torch.float32, *checks.SIXTEEN_BIT)
    checks.require("the gradient", values, allowed, None, values.device)
    checks.packed(bits, values.numel(), values.device, start)
    _loaded().pmp_zero_complement(
        _pointer(values),
        ctypes.c_int64(values.element_size()),
        _pointer(bits),
        ctypes.c_int64(start),
        ctypes.c_int64(values.numel()),
        ctypes.c_int(torch.get_num_threads()),
    )


def _block() -> int:
    return int(_loaded().pmp_block())


def _loaded() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "kernels_for offers this module where library() is not None"
    return loaded


def _check_on_cpu(tensor: torch.Tensor) -> None:
    """Require a CPU tensor; an operator's other tensors are compared with this one."""
    if tensor.device.type != "cpu":
        raise ValueError(f"the C++ operators need tensors on the CPU; one is on {tensor.device}")


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
