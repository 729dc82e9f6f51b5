"""The C++ operators of the masked update, compiled at first use and kept in the user's cache.
Kernels has the contract.

Plain C functions without torch's headers: one second to compile, no Python headers needed. Where
there is no C++ compiler ``library`` is None, and the torch reference of masked_adamw.py serves.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from pathlib import Path

import torch

from pmp_ds.run_dir import atomic_path

SOURCE = Path(__file__).with_name("masked_adamw.cpp")
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp",
    "-ffp-contract=off",  # every operation is rounded on its own, as in the reference
    "-fno-math-errno",  # lets sqrt be a vector instruction; it is correctly rounded all the same
)  # fmt: skip


class Coefficients(ctypes.Structure):
    """What one AdamW step needs of its hyper-parameters, fp32."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            "decay", "beta1", "grad_weight", "beta2", "grad_sq_weight", "minus_step_size",
            "sqrt_correction2", "eps",
        )
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled operators, or None (with one warning) when they cannot be compiled."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        _warn("no C++ compiler was found (on Debian or Ubuntu: apt install g++)")
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        _warn(f"{compiler} failed: {str(detail).strip()[:500]}")
        return None
    loaded.pmp_block.restype = ctypes.c_int64
    return loaded


def _warn(reason: str) -> None:
    warnings.warn(
        f"the masked optimizer runs in torch operations, many times slower on CPU: {reason}",
        stacklevel=3,
    )


def _compiled(compiler: str) -> Path:
    """The shared object for this source, compiler and kind of machine. Safe for many processes:
    each compiles aside and renames."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    recipe = [SOURCE.read_text(), *FLAGS, version, platform.machine()]
    digest = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pmp_ds"
    path = cache / f"masked_adamw-{digest}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(temporary)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
    return path


def kept_before_blocks(bits: torch.Tensor, block: int) -> torch.Tensor:
    """Kept elements before each run of ``block`` elements, (ceil(8 * len(bits) / block),) int64;
    on the device of ``bits``."""
    num_bytes = (bits.numel() * 8 + block - 1) // block * (block // 8)
    counts = torch.zeros(num_bytes, dtype=torch.uint8, device=bits.device)
    table = [byte.bit_count() for byte in range(256)]
    counts[: bits.numel()] = torch.tensor(table, dtype=torch.uint8, device=bits.device)[bits.int()]
    per_block = counts.view(-1, block // 8).sum(dim=1, dtype=torch.int64)
    return per_block.cumsum(0) - per_block


def block_prefix(bits: torch.Tensor) -> torch.Tensor:
    """Kept elements before each block of the operator."""
    return kept_before_blocks(bits, _loaded().pmp_block())


def masked_adamw(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    bits: torch.Tensor | None,
    prefix: torch.Tensor | None,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    coefficients: Coefficients,
) -> None:
    """One AdamW step on the kept elements, in place."""
    _loaded().pmp_masked_adamw(
        _pointer(weights), _pointer(gradient), _pointer(bits), _pointer(prefix),
        ctypes.c_int64(weights.numel()), _pointer(exp_avg), _pointer(exp_avg_sq),
        ctypes.byref(coefficients), ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip


def has_compact_master(dtype: torch.dtype) -> bool:
    """Every compiler has bf16, which is integers; fp16 is a type of its own."""
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
    """One AdamW step on the compact fp32 master with the gradient times ``factor``; the kept
    weights receive it rounded. In place."""
    assert gradient.dtype in (torch.float32, weights.dtype)
    _loaded().pmp_masked_adamw_master(
        _pointer(weights), ctypes.c_int(weights.dtype == torch.float16), _pointer(gradient),
        ctypes.c_int(gradient.dtype == torch.float32), _pointer(bits), _pointer(prefix),
        ctypes.c_int64(weights.numel()), _pointer(master), _pointer(exp_avg), _pointer(exp_avg_sq),
        ctypes.c_float(factor), ctypes.byref(coefficients), ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip


def zero_complement(values: torch.Tensor, bits: torch.Tensor, start: int) -> None:
    """Zero each value i whose bit ``start + i`` is 0, in place."""
    _loaded().pmp_zero_complement(
        _pointer(values), ctypes.c_int64(values.element_size()), _pointer(bits),
        ctypes.c_int64(start), ctypes.c_int64(values.numel()),
        ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip


def _loaded() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "kernels_for offers this module where library() is not None"
    return loaded


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or (tensor.is_contiguous() and tensor.device.type == "cpu")
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
