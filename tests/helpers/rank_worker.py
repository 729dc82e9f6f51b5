"""One rank of tests/helpers/distributed.py: call the function named on the pipe, send its
result."""

import ctypes
import faulthandler
import functools
import importlib
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any


def resolve(name: str) -> Any:
    """Return the object at ``package.module:qualified.name``."""
    module, _, path = name.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def call(request: bytes) -> bytes:
    """Return (True, result) or (False, traceback), pickled."""
    try:
        name, args = pickle.loads(request)
        target = resolve(name) if name is not None else lambda: None
        before = package_names()
        result = target(*args)
        after = package_names()
        if changed := [name for name, value in before.items() if after.get(name) is not value]:
            raise AssertionError(f"left changed for the next test in this process: {changed}")
        return pickle.dumps((True, result))
    except BaseException:  # noqa: BLE001  SystemExit as well: the test hears of everything
        return pickle.dumps((False, traceback.format_exc()))


def package_names() -> dict[str, Any]:
    """Return every public name of the loaded modules of the package, and what it means."""
    return {
        f"{module.__name__}.{name}": value
        for module in list(sys.modules.values())
        if (getattr(module, "__name__", None) or "").split(".")[0] == "pmp_ds"
        for name, value in list(vars(module).items())
        if not name.startswith("_")
    }


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    # A rank that is suspended between two calls cannot see that the pipe has ended.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Write the stacks of a hanging rank, even while a collective holds it outside Python.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    faulthandler.enable()
    pipe = Connection(int(sys.argv[1]))
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        """End this process when its parent is gone, whatever the main thread is doing."""
        try:
            while True:
                requests.put(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        pipe.send_bytes(call(requests.get()))


if __name__ == "__main__":
    main()
