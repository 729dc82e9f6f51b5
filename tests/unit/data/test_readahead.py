"""Prefetched pages come into memory without being touched (in a file on a disk: memory file
systems have them there from the start)."""

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np

from pmp_ds.data.readahead import will_need

PAGE = mmap.PAGESIZE


def resident(view: np.ndarray) -> np.ndarray:
    """Return whether each page of a mapped array, which starts at a page, is in memory."""
    flags = (ctypes.c_ubyte * (view.nbytes // PAGE))()
    place, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.nbytes)
    assert ctypes.CDLL(None).mincore(place, length, flags) == 0
    return np.array(flags, np.uint8) & 1 == 1


def test_pages_come_without_being_touched(tmp_path: Path):
    path = tmp_path / "blocks"
    path.write_bytes(os.urandom(12_000 * PAGE * 3 // 2))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    blocks = np.memmap(path, np.uint16, "r").reshape(-1, PAGE * 3 // 4)  # one and a half pages
    rows = np.arange(100, len(blocks), 999)
    first = rows * 3 // 2
    pages = np.union1d(first, first + 1)
    will_need(blocks, rows)
    deadline = time.monotonic() + 20
    while not resident(blocks)[pages].all():
        assert time.monotonic() < deadline, "the pages were not read"
        time.sleep(0.01)
