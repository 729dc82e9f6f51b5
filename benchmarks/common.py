"""Shared parts of the benchmarks: hardware, interleaved timings, figure lines."""

import argparse
import contextlib
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--numel", type=int, default=50_000_000, help="elements")
    parser.add_argument("--density", type=float, default=0.7, help="fraction that is kept")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def find_ninja() -> None:
    """Let DeepSpeed find the ninja beside this Python, to build its optimizers."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def hardware(device: torch.device) -> str:
    """Return one line that describes the hardware."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    model = facts.get("model name", "unknown CPU")
    if "cpu family" in facts:
        model += f" (family {facts['cpu family']} model {facts['model']})"
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def interleaved_ms(
    runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Return the median milliseconds of each run. All take turns, so a slow moment of the machine
    affects all; one unmeasured round comes first. On CUDA ten calls share a measurement, which
    hides launches."""
    calls = 10 if device.type == "cuda" else 1
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            synchronize(device)
            if round_number:
                samples[name].append((time.perf_counter() - start) * 1e3 / calls)
    return {name: statistics.median(times) for name, times in samples.items()}


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory of ``run`` beyond what was in use, its result included; None if the
    system does not report it."""
    before = bytes_in_use(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    except OSError:
        return None
    run()
    return status_bytes("VmHWM") - before


def bytes_in_use(device: torch.device) -> int:
    """Return the bytes of all tensors on a GPU; on CPU those of the process, without freed ones."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(AttributeError, OSError):  # without glibc
        ctypes.CDLL(None).malloc_trim(0)
    return status_bytes("VmRSS")


def print_figure(
    name: str, value: float, goal: float | None = None, *, at_least: bool = False, digits: int = 2
) -> None:
    """Print the line of a figure, which `make bench` collects; some have no goal."""
    if goal is None:
        print(f"figure {name} {value:.{digits}f}")
        return
    sign, met = (">=", value >= goal) if at_least else ("<=", value <= goal)
    print(f"figure {name} {value:.{digits}f} goal {sign} {goal} {'met' if met else 'short'}")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def status_bytes(field: str) -> int:
    """Return a field of /proc/self/status, such as VmRSS, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
