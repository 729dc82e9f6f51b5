"""Drop root's right to write anywhere, for tests of read-only folders."""

import contextlib
import ctypes
from collections.abc import Iterator

_VERSION_3, _DAC_OVERRIDE = 0x20080522, 1


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


@contextlib.contextmanager
def without_dac_override() -> Iterator[None]:
    """Make file modes apply in this thread and the threads it starts. Nothing changes for users to
    whom they apply anyway."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(_VERSION_3, 0), (_Data * 2)()

    def call(function: str) -> None:
        if getattr(libc, function)(ctypes.byref(header), data) != 0:
            raise OSError(ctypes.get_errno(), function)

    call("capget")
    before = data[0].effective
    data[0].effective = before & ~(1 << _DAC_OVERRIDE)
    call("capset")
    try:
        yield
    finally:
        data[0].effective = before
        call("capset")
