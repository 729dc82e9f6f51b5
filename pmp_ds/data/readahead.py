"""Prefetch scattered blocks of mapped files before they are used.

Reading them one by one waits for the disk once per block; requested together, the disk serves many
at a time. It costs a system call per block, so it is used for cold files only.
"""

import ctypes
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def will_need(
    blocks: npt.NDArray[Any],  # (n, block_size), mapped
    rows: npt.NDArray[np.integer],  # (m,)
) -> None:
    """Start reading these rows into memory and return at once. A hint: errors are ignored."""
    starts = blocks.ctypes.data + rows.astype(np.int64) * blocks.strides[0]
    pages = starts & -mmap.PAGESIZE
    for page, length in zip(
        pages.tolist(), (starts - pages + blocks.strides[0]).tolist(), strict=True
    ):
        _madvise(page, length, mmap.MADV_WILLNEED)
