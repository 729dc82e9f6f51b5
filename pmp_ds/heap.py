"""Host memory that tensors free goes back to the system, which glibc otherwise keeps in pieces.

Once a block of up to 32 MB has been freed, glibc takes later ones of its size from a heap that
fragments: at ZeRO 3 on CPU 2 to 3 bytes per parameter. Other C libraries are left as they are.
"""

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 1 << 20  # bytes


def return_large_blocks() -> None:
    """From now on, give large blocks back when they are freed."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
