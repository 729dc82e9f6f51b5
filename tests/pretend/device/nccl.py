"""torch.distributed as if its groups were NCCL's; the bytes travel over gloo through host memory.

A collective takes tensors of the device alone and runs on a stream of its own: it waits for the
current stream, and the current stream for it, or `wait()` of its handle. Collectives of Python
objects and barriers make the host wait. A group that is asked to be gloo is left as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.pretend.device.cuda import Event, Stream, current_stream

_TENSORS = (
    "all_reduce",
    "broadcast",
    "reduce",
    "all_gather",
    "all_gather_into_tensor",
    "gather",
    "scatter",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all",
    "all_to_all_single",
    "send",
    "recv",
    "isend",
    "irecv",
)
_HOST = (
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "barrier",
)
_gloo_groups: list[Any] = []
_streams: list[Stream] = []


class _Handle:
    """A collective that was asked for with ``async_op``."""

    def __init__(self, done: Event) -> None:
        self._done = done

    def wait(self, timeout: Any = None) -> bool:
        self._done.wait()
        return True

    def is_completed(self) -> bool:
        return self._done.query()


def install() -> None:
    """Replace the collectives in torch.distributed; DeepSpeed and pmp_ds look them up there."""
    for name in _TENSORS:
        setattr(dist, name, _of_tensors(name, getattr(dist, name)))
    for name in _HOST:
        setattr(dist, name, _of_host(name, getattr(dist, name)))
    dist.new_group = _grouping(dist.new_group)


def _grouping(real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def new_group(*args: Any, **kwargs: Any) -> Any:
        group = real(*args, **{**kwargs, "backend": "gloo"})
        if kwargs.get("backend") == "gloo":
            _gloo_groups.append(group)
        return group

    return new_group


def _on_gloo(args: Any, kwargs: Any) -> bool:
    return any(given is group for given in (*args, *kwargs.values()) for group in _gloo_groups)


def _of_tensors(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def collective(*args: Any, **kwargs: Any) -> Any:
        tensors = _tensors([*args, *kwargs.values()])
        gloo = _on_gloo(args, kwargs)
        if any(tensor.is_cuda == gloo for tensor in tensors):
            torch.ops.pretend.refuse(
                f"{name}: no backend of {'gloo' if gloo else 'NCCL'} for a tensor on "
                f"{'cuda' if gloo else 'cpu'}"
            )
        if gloo:
            return real(*args, **kwargs)
        if not _streams:
            _streams.append(Stream())
        (stream,) = _streams
        stream.wait_stream(current_stream())
        with stream:
            torch.ops.pretend.launch(tensors, tensors, name)
        handle = real(*_on_host(list(args)), **_on_host(kwargs))
        if hasattr(handle, "wait"):
            handle.wait()
        done = stream.record_event()
        if kwargs.get("async_op", False) or name in ("isend", "irecv"):
            return _Handle(done)
        done.wait()
        return None

    return collective


def _of_host(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def collective(*args: Any, **kwargs: Any) -> Any:
        if not _on_gloo(args, kwargs):
            torch.ops.pretend.wait(f"{name} over NCCL")
        kwargs.pop("device_ids", None)
        return real(*args, **kwargs)

    return collective


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.ops.pretend.cpu_alias(value.detach())
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_host(item) for item in value)
    return value
