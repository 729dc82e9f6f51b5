"""Whole training updates: ours on the ticket against plain DeepSpeed and a loop in plain torch.

    python -m benchmarks.step
    python -m benchmarks.step --offload
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.step
    deepspeed --num_accelerators 2 --module benchmarks.step --shape tinyllama-1.1b --batch 8x2048

Same model, batch, precision and ranks; contenders.py says what each contender is, and all take
turns. Ratios are medians of those in the same round. Prints a table, then a line per figure; the
exit code says only whether it ran.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import cast

from benchmarks.common import hardware, print_figure
from benchmarks.contenders import Contender, Ours, PlainDeepSpeed, TorchLoop
from benchmarks.shapes import Setup, start, training_arguments
from benchmarks.turns import Measured, Turns
from pmp_ds import dist
from pmp_ds.engine.figures import flops_per_token, peak_flops
from pmp_ds.model.parameters import num_params

CONTENDERS: dict[str, Callable[[Setup], Contender]] = {
    "ours": Ours,
    "ours-dense": lambda setup: Ours(setup, masked=False),
    "deepspeed": PlainDeepSpeed,
    "deepspeed-compiled": lambda setup: PlainDeepSpeed(setup, compiled=True),
    "torch": lambda setup: TorchLoop(setup, compiled=False),
    "torch-compiled": lambda setup: TorchLoop(setup, compiled=True),
    "torchao-offload": lambda setup: TorchLoop(setup, compiled=False, offloaded=True),
}
# Tokens per second of ours against plain DeepSpeed's on a GPU; 1 for other shapes and batches.
SPEED_GOALS = {("tinyllama-1.1b", 32, 256): 1.10, ("tinyllama-1.1b", 8, 2048): 1.05}


def main(options: argparse.Namespace) -> None:
    """Measure, and print on rank 0. Collective."""
    setup = Setup(options)
    rivals = options.rivals or list(_rivals(setup))
    _settle(options)
    turns = Turns(setup.device, options.updates)
    for name in ["ours", *rivals]:
        turns.add(name, functools.partial(CONTENDERS[name], setup))
    measured = turns.run(options.repeats)
    if dist.rank() == 0:
        _print_table(setup, turns, measured)
        _print_figures(setup, measured, _mfu(setup, turns, measured["ours"]))


def _rivals(setup: Setup) -> Iterator[str]:
    yield "deepspeed"
    if not setup.options.offload:
        yield "torch-compiled" if setup.on_gpu else "torch"
    elif setup.on_gpu and dist.world_size() == 1:  # what torchao's offload is made for
        if importlib.util.find_spec("torchao") is not None:
            yield "torchao-offload"
        else:
            print("torchao is not installed: its offload is left out")


def _settle(options: argparse.Namespace) -> None:
    """Make an update of a tiny model, so that libraries and the device's buffers do not count as
    memory of the first contender."""
    tiny = {"shape": "tiny", "batch": (dist.world_size(), 16), "compile": "none"}
    ours = Ours(Setup(argparse.Namespace(**vars(options) | tiny)))
    ours.backward()
    ours.step()
    ours.engine.close()


def _print_table(setup: Setup, turns: Turns, measured: dict[str, Measured]) -> None:
    ours = cast(Ours, turns.contenders["ours"])
    print(f"hardware: {hardware(setup.device)}")
    print(setup.in_words(num_params(ours.table)))
    columns = f"{'tokens/s':>10}{'ms':>9}{'forward, backward':>19}{'step':>9}{'CPU ms':>9}"
    print(f"{'':34}{columns}{'peak GB':>9}")
    for name, one in measured.items():
        print(
            f"{turns.contenders[name].title:34}{_rate(setup, one):10,.0f}{one.median('ms'):9.1f}"
            f"{one.median('backward_ms'):19.1f}{one.median('step_ms'):9.1f}"
            f"{one.median('cpu_ms'):9.1f}{one.median('peak_bytes') / 1e9:9.2f}"
        )


def _print_figures(setup: Setup, measured: dict[str, Measured], mfu: float | None) -> None:
    ours, shape, on_gpu = measured["ours"], setup.options.shape, setup.on_gpu
    wanted = 400_000 if on_gpu and shape == "gpt2-small" else None
    print_figure("step_tokens_per_second", _rate(setup, ours), wanted, at_least=True)
    if mfu is not None:
        goal = 0.45 if shape == "tinyllama-1.1b" else None
        print_figure("step_mfu", mfu, goal, at_least=True)
    for name, one in measured.items():
        if name == "ours":
            continue
        plain, against = name == "deepspeed", name.replace("-", "_")
        speed = (
            SPEED_GOALS.get((shape, setup.num_sequences, setup.num_tokens), 1.0) if on_gpu else 1.0
        )
        goal = speed if plain else None
        print_figure(f"step_speed_vs_{against}", one.against(ours, "ms"), goal, at_least=True)
        if not on_gpu:
            print_figure(f"step_cpu_time_vs_{against}", ours.against(one, "cpu_ms"))
        # Under offload DeepSpeed takes the norm in the backward pass: only whole updates compare.
        goal = (0.4 if on_gpu else 1.0) if plain and not setup.options.offload else None
        print_figure(f"step_optimizer_vs_{against}", ours.against(one, "step_ms"), goal)
        goal = 0.85 if plain and on_gpu else None
        print_figure(f"step_peak_memory_vs_{against}", ours.against(one, "peak_bytes"), goal)


def _rate(setup: Setup, one: Measured) -> float:
    """Return tokens per second of all ranks."""
    return setup.num_sequences * setup.num_tokens / one.median("ms") * 1e3


def _mfu(setup: Setup, turns: Turns, ours: Measured) -> float | None:
    engine = cast(Ours, turns.contenders["ours"]).engine
    peak = peak_flops(setup.device, engine.dtype)
    if peak is None:
        return None
    flops = flops_per_token(engine.hf_config, engine.num_params, setup.num_tokens)
    return _rate(setup, ours) * flops / peak / dist.world_size()


def arguments() -> argparse.ArgumentParser:
    parser = training_arguments("whole training updates")
    parser.add_argument(
        "--rivals",
        nargs="+",
        choices=[name for name in CONTENDERS if name != "ours"],
        help="what ours is compared with; unset: deepspeed, and torch or on a GPU torch-compiled; "
        "with --offload deepspeed, and on a GPU torchao-offload (pip install --no-deps torchao)",
    )
    return parser


if __name__ == "__main__":
    start(main, arguments())
