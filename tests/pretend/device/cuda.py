"""torch.cuda on the pretend device: load it, and replace what torch's CPU build lacks.

load(program)    # before torch is imported
install(1)       # after
"""

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from tests.pretend.device import findings


def load(program: str) -> None:
    """Load the compiled device, which registers itself with torch's libraries."""
    import sys

    assert "torch" not in sys.modules, "torch looks up its CUDA hooks when it is imported"
    loaded = ctypes.CDLL(program, mode=ctypes.RTLD_GLOBAL)
    loaded.pretend_listen(findings.listener)


def install(num_devices: int) -> None:
    """Make torch.cuda the pretend device."""
    import torch

    torch.ops.pretend.set_device_count(num_devices)
    torch.ops.pretend.register_operators(_mixing_operators())
    for name, value in _replacements(num_devices).items():
        setattr(torch.cuda, name, value)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _always(None))
    torch.Tensor.record_stream = _record_stream  # type: ignore[assignment,method-assign]  # whole


def _mixing_operators() -> list[str]:
    """Return the operators that torch's own table exempts from the check of devices: TensorIterator
    checks them, and lets CPU tensors without dimensions in."""
    import torchgen

    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    functions = re.split(r"^- func: ", table.read_text(), flags=re.MULTILINE)[1:]
    exempt = re.compile(r"^  device_check: NoCheck", re.MULTILINE)
    return [text.partition("(")[0] for text in functions if exempt.search(text)]


def _ops() -> Any:
    import torch

    return torch.ops.pretend


class Event:
    """A point in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._handle = 0

    def record(self, stream: "Stream | None" = None) -> None:
        self._free()
        self._handle = _ops().event((stream or current_stream()).id)

    def wait(self, stream: "Stream | None" = None) -> None:
        if self._handle:
            _ops().wait_event(self._handle, (stream or current_stream()).id)

    def synchronize(self) -> None:
        _ops().synchronize_event(self._handle)

    def query(self) -> bool:
        if self._handle:
            _ops().query_event(self._handle)
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1.0

    def _free(self) -> None:
        if self._handle:
            _ops().free_event(self._handle)
        self._handle = 0

    def __del__(self) -> None:
        self._free()


class Stream:
    """A queue of launches; number 0 is the default stream."""

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None) -> None:
        import torch

        self.id = _ops().new_stream() if number is None else number
        self.device = torch.device("cuda", _ops().device())
        self.stream_id = self.cuda_stream = self.id
        self._before: list[int] = []

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: "Stream") -> None:
        other.record_event().wait(self)

    def synchronize(self) -> None:
        _ops().synchronize_stream(self.id)

    def query(self) -> bool:
        return self.record_event().query()

    def __enter__(self) -> "Stream":
        self._before.append(_ops().stream())
        _ops().set_stream(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        _ops().set_stream(self._before.pop())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)


def current_stream(device: Any = None) -> Stream:
    return Stream(number=_ops().stream())


@contextlib.contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    with stream or contextlib.nullcontext():
        yield


class _OnDevice(contextlib.nullcontext[None]):
    """A process uses one device."""

    def __init__(self, *_: Any) -> None:
        super().__init__()


class _Properties:
    name = "pretend CUDA device"
    total_memory: ClassVar[int] = 80 << 30
    major, minor, multi_processor_count, warp_size = 9, 0, 132, 32


def _record_stream(tensor: Any, stream: Any) -> None:
    _ops().record_stream(tensor, stream.id)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _replacements(num_devices: int) -> dict[str, Any]:
    import torch

    def set_device(device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index or 0
        if index >= num_devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        _ops().set_device(index)

    # One function for each name: torch._dynamo refuses one that stands in two places.
    yes = ("is_initialized", "is_available", "is_bf16_supported")
    nothing = ("_lazy_init", "init", "empty_cache", "manual_seed", "manual_seed_all")
    return {
        "_initialized": True,
        **{name: _always(True) for name in yes},
        **{name: _always(None) for name in nothing},
        "device_count": _always(num_devices),
        "current_device": lambda: _ops().device(),
        "set_device": set_device,
        "device": _OnDevice,
        "device_of": lambda tensor: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "current_stream": current_stream,
        "default_stream": lambda device=None: Stream(number=0),
        "stream": _on_stream,
        "set_stream": lambda stream: _ops().set_stream(stream.id),
        "synchronize": lambda device=None: _ops().synchronize(),
        "is_current_stream_capturing": _always(False),
        "memory_allocated": lambda device=None: _ops().counts()[2],
        "memory_reserved": lambda device=None: _ops().counts()[2],
        "max_memory_allocated": lambda device=None: _ops().counts()[3],
        "max_memory_reserved": lambda device=None: _ops().counts()[3],
        "reset_peak_memory_stats": lambda device=None: _ops().reset_peak(),
        "memory_stats": lambda device=None: {},
        "mem_get_info": _always((_Properties.total_memory, _Properties.total_memory)),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": _always(None),  # the CPU's generator draws, and is restored itself
        "get_device_properties": _always(_Properties),
        "get_device_name": _always(_Properties.name),
        "get_device_capability": _always((_Properties.major, _Properties.minor)),
    }
