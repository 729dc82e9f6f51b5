"""Read numbers and times of the device without making the host wait for it."""

import time
from collections.abc import Sequence

import torch


class Later:
    """Numbers on their way from the device to the host; ``read`` waits until they arrive."""

    def __init__(self, numbers: torch.Tensor) -> None:
        """Copy ``numbers``, (n,) or (), from any device; later changes have no effect here."""
        self._arrived: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._numbers = numbers.detach().clone()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._numbers.view(-1).tolist()
        return numbers


class Span:
    """Device seconds spent inside a DeviceClock; ``read`` waits for the last exit."""

    def __init__(self, events: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]], host: float):
        self._events, self._host = tuple(events), host

    def read(self) -> float:
        if self._events:
            self._events[-1][1].synchronize()
        return self._host + sum(start.elapsed_time(end) for start, end in self._events) / 1e3


class DeviceClock:
    """A context that adds up the device time spent inside it since the last ``reset``."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._host = self._start = 0.0

    def reset(self) -> None:
        self._events, self._host = [], 0.0

    @property
    def span(self) -> Span:
        return Span(self._events, self._host)

    def __enter__(self) -> "DeviceClock":
        if self._cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events.append(events)
            events[0].record()
        else:
            self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._host += time.perf_counter() - self._start
