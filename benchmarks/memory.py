"""Bytes of weights and optimizer states per parameter: ours in every format, and others'.

    python -m benchmarks.memory

Every contender trains a stack of matrices in bf16 for a few updates, in a process of its own, and
then one twice as high: the figures are the difference, so that what every process has does not
count. *states*: what is in memory between updates; *peak*: the most during an update, with
gradients. torchao is measured if it is installed (`pip install --no-deps torchao`).
"""

import argparse
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import hardware, print_figure, status_bytes

WIDTH = 2048
UPDATES = 3
HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
OURS = [
    ("dense", "fp32"),
    ("compact", "fp32"),
    ("split", "fp32"),
    ("compact", "bf16"),
    ("split", "bf16"),
    ("dense", "int8"),
    ("split", "int8"),
]
GOALS = {
    ("dense", "fp32"): 11.8,
    ("compact", "fp32"): 10.6,
    ("split", "bf16"): 7.0,
    ("dense", "int8"): 7.6,
}
"""Most bytes of states per parameter, at density 0.7."""

Step = Callable[[], object]


def main(options: argparse.Namespace) -> None:
    if options.only:
        print(json.dumps(_measure(options.only, options.layers, options)))
        return
    names = [f"ours {master} {moments}" for master, moments in OURS]
    names += ["deepspeed dense fp32", "deepspeed bf16 states"]
    found_torchao = importlib.util.find_spec("torchao") is not None
    names += ["torchao 8bit", "torchao 4bit"] if found_torchao else []
    device = torch.device(options.device)
    print(f"hardware: {hardware(device)}")
    print(f"{options.layers * WIDTH**2:,} parameters and twice as many, density {options.density}")
    print(
        f"{'bytes per parameter':28}{'states':>9}{'peak':>8}  master weights, moments", flush=True
    )
    found = {}
    for name in names:
        measured = _slope(name, options.layers)
        if isinstance(measured, str):
            print(f"{name:28}{'failed':>9}          {measured}")
            continue
        found[name] = measured
        words = _IN_WORDS.get(name) or "{} fp32, {}".format(*name.split()[1:])
        print(f"{name:28}{measured['states']:9.2f}{measured['peak']:8.2f}  {words}", flush=True)
    if not found_torchao:
        print("torchao is not installed: its optimizers are left out")
    for (master, moments), goal in GOALS.items():
        if (one := found.get(f"ours {master} {moments}")) is not None and options.density == 0.7:
            print_figure(f"states_{master}_{moments}", one["states"], goal)
    if (dense := found.get("deepspeed dense fp32")) is not None and "ours split bf16" in found:
        ours = found["ours split bf16"]
        print_figure("peak_split_bf16_vs_dense", ours["peak"] / dense["peak"], 0.85)


_IN_WORDS = {
    "deepspeed dense fp32": "dense fp32, fp32 (torch's AdamW)",
    "deepspeed bf16 states": "none, bf16 (rounded to the nearest)",
    "torchao 8bit": "none: weights rounded at random, 8-bit",
    "torchao 4bit": "none: weights rounded at random, 4-bit",
}


def _slope(name: str, layers: int) -> dict[str, float] | str:
    """Bytes per parameter, or why there are none."""
    found = []
    for size in (layers, 2 * layers):
        one = _in_a_process(name, size)
        if isinstance(one, str):
            return one
        found.append(one)
    low, high = found
    return {what: (high[what] - low[what]) / (layers * WIDTH**2) for what in low}


def _in_a_process(name: str, layers: int) -> dict[str, int] | str:
    own = ["--only", name, "--layers", str(layers)]
    command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], *own]
    # With one arena and a low threshold, what is freed goes back to the system at once.
    quiet = {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    done = subprocess.run(
        command, env={**os.environ, **quiet}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:120]
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _measure(name: str, layers: int, options: argparse.Namespace) -> dict[str, int]:
    device = torch.device(options.device)
    torch.manual_seed(0)
    who, *how = name.split()
    _warm_up(device)
    model = torch.nn.Sequential(
        *(
            torch.nn.Linear(WIDTH, WIDTH, bias=False, device=device, dtype=torch.bfloat16)
            for _ in range(layers)
        )
    )
    step = _torchao(model, how[0]) if who == "torchao" else _deepspeed(model, how, options)
    batch = torch.randn(4, WIDTH, device=device, dtype=torch.bfloat16)
    for update in range(UPDATES):
        if update == UPDATES - 1:
            _reset_peak(device)
        step(batch)
    return {"states": _in_use(device), "peak": _peak(device)}


def _deepspeed(model: torch.nn.Module, how: list[str], options: argparse.Namespace) -> Any:
    import deepspeed

    from pmp_ds import dist
    from pmp_ds.config.moments import MOMENTS
    from pmp_ds.optim.attach import attach
    from pmp_ds.optim.masked_adamw import MaskedAdamW
    from pmp_ds.ticket.mask import ParamMask, pack

    dist.init()
    ours = how[0] in ("dense", "compact", "split") and options.only.startswith("ours")
    ds_json: dict[str, Any] = {
        "train_batch_size": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "overlap_comm": False},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
    }
    optimizer: Any
    if ours:
        master: Any = how[0]
        optimizer = MaskedAdamW(
            model.parameters(), **HYPER, master=master, moment_format=MOMENTS[how[1]]
        )
    else:
        fused = how[0] == "dense"
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused, **HYPER)
        if how[0] == "bf16":
            ds_json["bf16"] |= {
                "bf16_master_weights_and_grads": True,
                "bf16_optimizer_states": True,
            }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_json)
    if ours:
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        bits = {
            name: pack(torch.rand(WIDTH * WIDTH) < options.density).to(engine.device)
            for name in shapes
        }
        attach(engine, optimizer, ParamMask(bits=bits, shapes=shapes))

    def step(batch: torch.Tensor) -> None:
        engine.backward(engine(batch).float().square().mean())
        engine.step()

    return step


def _torchao(model: torch.nn.Module, how: str) -> Any:
    from torchao import optim

    kind = {"8bit": optim.AdamW8bit, "4bit": optim.AdamW4bit}[how]
    optimizer = kind(model.parameters(), **HYPER, bf16_stochastic_round=True)

    def step(batch: torch.Tensor) -> None:
        model(batch).float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _warm_up(device: torch.device) -> None:
    """Load what every contender needs before memory is counted."""
    import deepspeed  # noqa: F401

    from pmp_ds.optim.kernels import compiler

    compiler.library()
    layer = torch.nn.Linear(64, 64, device=device, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(4, 64, device=device, dtype=torch.bfloat16)).float().sum().backward()
    optimizer.step()


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    return status_bytes("VmRSS")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    return (
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="memory of weights and optimizer states",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=10, help=f"matrices of {WIDTH} x {WIDTH}")
    parser.add_argument("--density", type=float, default=0.7, help="fraction that is kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="measure this contender alone, and print JSON")
    main(parser.parse_args())
