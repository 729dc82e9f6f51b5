"""Contenders take turns: times by part, and memory, of whole training updates.

A slow moment of the machine then affects all of them, and their medians can be compared.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.common import bytes_in_use, peak_extra_bytes, synchronize
from benchmarks.contenders import Contender
from pmp_ds import dist
from pmp_ds.engine.clock import DeviceClock

WARM_UP = 1  # turns that do not count


@dataclass(frozen=True)
class Round:
    """What a contender measures in one turn: of each value, the highest of all ranks."""

    ms: float
    """Of an update."""
    backward_ms: float
    """Of its forward and backward passes."""
    step_ms: float
    cpu_ms: float
    """Of an update, of all threads: what else the machine does counts less."""
    peak_bytes: float
    """What the contender holds and needs, as if it were alone."""


@dataclass(frozen=True)
class Measured:
    """What a contender measures in all rounds."""

    rounds: tuple[Round, ...]

    def median(self, value: str) -> float:
        """Return the median of a field of ``Round``."""
        return statistics.median(getattr(one, value) for one in self.rounds)

    def against(self, other: "Measured", value: str) -> float:
        """Return the median of the ratios to ``other`` in the same round."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(getattr(a, value) / getattr(b, value) for a, b in pairs)


class Turns:
    """The contenders of a process, built one after the other."""

    def __init__(self, device: torch.device, updates: int) -> None:
        self.contenders: dict[str, Contender] = {}
        self._device, self._updates = device, updates
        self._held: dict[str, int] = {}
        self._clocks = DeviceClock(device), DeviceClock(device)

    def add(self, name: str, build: Callable[[], Contender]) -> None:
        """Build a contender and warm it up. Collective."""
        before = self._in_use()
        contender = build()
        for _ in range(WARM_UP):
            self._turn(contender)
        self.contenders[name] = contender
        self._held[name] = self._in_use() - before

    def run(self, rounds: int) -> dict[str, Measured]:
        """Return what each contender measures, the same on every rank. Collective."""
        samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in self.contenders}
        for _ in range(rounds):
            for name, contender in self.contenders.items():
                *times, extra = self._turn(contender)
                peak = max(self._held[name] + extra, 1.0)  # a tiny model's may round to nothing
                samples[name].append((*times, peak))
        ranks = dist.all_gather_object(samples)
        return {name: _highest([rank[name] for rank in ranks]) for name in samples}

    def _turn(self, contender: Contender) -> tuple[float, ...]:
        """Return the four times of ``Round`` and the extra memory."""
        self._in_use()
        torch.use_deterministic_algorithms(contender.deterministic, warn_only=True)
        dist.barrier()
        times: list[float] = []
        extra = peak_extra_bytes(lambda: times.extend(self._timed(contender)), self._device)
        return *times, float("nan") if extra is None else extra

    def _timed(self, contender: Contender) -> list[float]:
        contender.backward()  # caches and freed pages are as the contender before has left them
        contender.step()
        backward, step = self._clocks
        backward.reset()
        step.reset()
        synchronize(self._device)
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(self._updates):
            with backward:
                contender.backward()
            with step:
                contender.step()
        synchronize(self._device)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        seconds = wall, backward.span.read(), step.span.read(), cpu
        return [one * 1e3 / self._updates for one in seconds]

    def _in_use(self) -> int:
        gc.collect()  # not while an update is timed
        return bytes_in_use(self._device)


def _highest(ranks: list[list[tuple[float, ...]]]) -> Measured:
    """Return one contender's samples, (ranks, rounds, values), as those of all ranks."""
    rounds = zip(*ranks, strict=True)
    return Measured(tuple(Round(*map(max, zip(*one, strict=True))) for one in rounds))
