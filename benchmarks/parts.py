"""The parts of `make bench`: which commands, on this machine."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.topk import LARGE

GB = 10**9


@dataclass(frozen=True)
class Machine:
    """What decides which parts run."""

    gpus: int
    gpu_bytes: int  # of the smallest

    @classmethod
    def here(cls) -> "Machine":
        gpus = torch.cuda.device_count()
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(gpus)]
        return cls(gpus, min(sizes, default=0))


@dataclass(frozen=True)
class Part:
    """A command that prints figures."""

    name: str
    command: tuple[str, ...]


def parts(machine: Machine, *, tiny: bool) -> list[Part]:
    """Return the parts for a machine, the most important first; ``tiny`` ones take seconds."""
    if tiny:
        return list(_tiny())
    return list(_on_gpu(machine) if machine.gpus else _on_cpu())


def _on_gpu(machine: Machine) -> Iterator[Part]:
    size, ranks = machine.gpu_bytes, machine.gpus
    large = size > 60 * GB
    numel = LARGE if size > 70 * GB else LARGE // 5 if size > 20 * GB else LARGE // 20
    yield _part("rates")
    if large:
        yield _step("tinyllama-1.1b", "32x256")
    yield _part("optimizer_step", "--numel", str(numel))
    yield _part("topk", "--numel", str(numel))
    if large:
        # The states of three and the activations of one fill about 90 GB.
        both = ("deepspeed", "torch-compiled")
        for rivals in [both] if size > 100 * GB else [both[:1], both[1:]]:
            yield _step("tinyllama-1.1b", "8x2048", *rivals)
    yield _step("gpt2-small", "32x256", "deepspeed", "deepspeed-compiled", "torch-compiled")
    yield _discovery("tinyllama-1.1b" if large else "gpt2-small", "32x256")
    if ranks > 1:
        yield _step("gpt2-small", f"{32 * ranks}x256", ranks=ranks)
    yield _step("gpt2-small", "32x256", options=("--offload",))
    yield from _memory()


def _on_cpu() -> Iterator[Part]:
    yield _part("rates")
    yield _step("10m", "8x64")
    yield _step("10m", "8x64", ranks=2)
    yield _step("10m", "8x64", options=("--offload",))
    yield _discovery("10m", "32x128", "--repeats", "5")
    yield _part("optimizer_step", "--numel", "50000000")
    yield _part("topk", "--numel", "10000000")
    yield from _memory()


def _tiny() -> Iterator[Part]:
    flat = ("--numel", "5000", "--repeats", "1", "--device", "cpu")
    yield _part("rates", *flat)
    yield _step("tiny", "4x16", options=("--repeats", "1"))
    yield _step("tiny", "4x16", options=("--repeats", "1", "--offload"))
    yield _discovery("tiny", "4x16", "--repeats", "1")
    yield _part("optimizer_step", *flat, "--without-deepspeed")
    yield _part("topk", *flat)


def _memory() -> Iterator[Part]:
    if importlib.util.find_spec("benchmarks.memory") is not None:
        yield _part("memory")


def _part(module: str, *options: str) -> Part:
    words = [option.removeprefix("--") for option in options]
    return Part(" ".join([module, *words]), _python(module, *options))


def _discovery(shape: str, batch: str, *options: str) -> Part:
    command = _python("discovery", "--shape", shape, "--batch", batch, *options)
    return Part(f"discovery {shape} {batch}", command)


def _step(
    shape: str, batch: str, *rivals: str, ranks: int = 1, options: tuple[str, ...] = ()
) -> Part:
    name = f"step {shape} {batch}" + (f", {ranks} ranks" if ranks > 1 else "")
    name += ", offload" if "--offload" in options else ""
    if len(rivals) == 1:
        name += f", against {rivals[0]}"
    options = ("--shape", shape, "--batch", batch, *options)
    if rivals:
        options += ("--rivals", *rivals)
    if ranks == 1:
        return Part(name, _python("step", *options))
    start = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} -m".split()
    return Part(name, (sys.executable, *start, "benchmarks.step", *options))


def _python(module: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.{module}", *options)
