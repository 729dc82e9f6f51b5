"""How much memory this rank's device has left, and how much of it a computation takes.

free = free_bytes(device)
with Meter(device) as meter:
    engine = ...
    peak = meter.peak_of(lambda: engine.trial(rows))
"""

import contextlib
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a GPU, or all processes together on
    the CPU: on the host, or in its container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + kept)
    limit = _container_limit()
    free = int(psutil.virtual_memory().available)
    if limit is None:
        return free
    # Files that the kernel may drop from memory do not count.
    reclaimable = _numbers("memory.stat").get("inactive_file", 0)
    return min(free, limit - int(_text("memory.current")) + reclaimable)


def hardware(device: torch.device) -> str:
    """Return the device and its memory, in words."""
    if device.type == "cuda":
        name, size = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    else:
        name, size = "CPU", _container_limit() or psutil.virtual_memory().total
    return f"{name} with {size / 1e9:.0f} GB"


def _container_limit() -> int | None:
    """Return the bytes that this container may use, None without a limit (control groups, v2)."""
    with contextlib.suppress(OSError, ValueError):
        return int(_text("memory.max"))  # or the word `max`
    return None


def _text(name: str) -> str:
    return (_CGROUP / name).read_text()


def _numbers(name: str) -> dict[str, int]:
    return {key: int(value) for key, value in map(str.split, _text(name).splitlines())}


class Meter:
    """A context that counts the bytes of tensors used inside it: on a GPU torch's own count, on the
    CPU by operators, without what their kernels allocate for themselves. On the meta device it
    counts the bytes that the tensors would have.

    ``observe`` receives the bytes in use after each operator, except on a GPU.
    """

    def __init__(
        self, device: torch.device, observe: Callable[[int], None] = lambda held: None
    ) -> None:
        self._device = device
        self._tensors = _Tensors(device.type, observe)
        self._before = 0

    def __enter__(self) -> "Meter":
        if self._device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._tensors.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._device.type != "cuda":
            self._tensors.__exit__(*error)

    def peak_of(self, action: Callable[[], object]) -> int:
        """Return the most bytes held at once during ``action``, those from before it included."""
        gc.collect()  # or tensors in cycles would count until Python looks for them
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            action()
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        self._tensors.peak = self._tensors.held
        action()
        return self._tensors.peak


class _Tensors(TorchDispatchMode):
    """Counts the bytes that operators have touched on one kind of device. Memory that nobody has
    written to, such as the rest of DeepSpeed's large buckets, takes no room on the CPU."""

    def __init__(self, kind: str, observe: Callable[[int], None]) -> None:
        super().__init__()
        self._kind, self._observe = kind, observe
        self.held = self.peak = 0
        self._touched: dict[int, int] = {}  # bytes, by the address of a storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.overloadpacket.__name__:
            for tensor in tree_leaves((args, kwargs, made)):
                # DeepSpeed keeps the shapes of parameters in tensors on the meta device.
                if isinstance(tensor, torch.Tensor) and tensor.device.type == self._kind:
                    self._count(tensor)
            self.peak = max(self.peak, self.held)
            self._observe(self.held)
        return made

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        end = int(tensor.storage_offset()) * tensor.element_size() + tensor.nbytes
        if storage._cdata not in self._touched:
            self._touched[storage._cdata] = 0
            weakref.finalize(storage, self._forget, storage._cdata).atexit = False
        more = min(end, storage.nbytes()) - self._touched[storage._cdata]
        if more > 0:
            self._touched[storage._cdata] += more
            self.held += more

    def _forget(self, address: int) -> None:
        self.held -= self._touched.pop(address)
