"""Seconds of the device that a piece of work takes, without making the host wait for it."""

import time

import torch


class DeviceClock:
    """Adds up the spans between entering and leaving it, since the last ``reset``."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._total = self._start = 0.0

    def reset(self) -> None:
        self._spans.clear()
        self._total = 0.0

    @property
    def seconds(self) -> float:
        """Waits for the end of the last span."""
        if not self._cuda:
            return self._total
        if self._spans:
            self._spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1e3

    def __enter__(self) -> "DeviceClock":
        if self._cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._spans.append(events)
            events[0].record()
        else:
            self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._spans[-1][1].record()
        else:
            self._total += time.perf_counter() - self._start
