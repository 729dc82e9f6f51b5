"""Selecting the ticket: select_top_k on one process against torch's ways to the same set.

    python -m benchmarks.topk

Prints a table per dtype, then a line per figure; the exit code says only whether it ran.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.common import arguments, hardware, interleaved_ms, peak_extra_bytes, print_figure
from pmp_ds.ticket.mask import unpack
from pmp_ds.ticket.topk import select_top_k

LARGE = 1_100_000_000
GPU_GOALS = {torch.float32: 7.0, torch.bfloat16: 3.0}  # ms for so many, on an H100
# Name, and passes over the scores: finite check, one or two histograms, count of ties, mask.
DTYPES = {torch.float32: ("fp32", 5), torch.bfloat16: ("bf16", 4)}


def main(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    k = int(options.density * options.numel)
    figures: list[tuple[str, float, float | None]] = []
    print(f"hardware: {hardware(device)}")
    for dtype, (short, passes) in DTYPES.items():
        generator = torch.Generator(device).manual_seed(0)
        scores = torch.randn(options.numel, device=device, generator=generator).abs_().to(dtype)
        runs = _runs(scores, k)
        (ours, *_) = runs
        mask = unpack(select_top_k([scores], [0], ["w"], k, replicated=True)[0], scores.numel())
        assert int(mask.sum()) == k
        assert bool(scores[mask].min() >= scores[~mask].max())
        del mask
        extra = {name: peak_extra_bytes(run, device) for name, run in runs.items()}
        ms = interleaved_ms(runs, device, options.repeats)
        read = passes * scores.element_size()
        print(
            f"{k} of {options.numel} {short} scores, median of {options.repeats}; ours reads "
            f"them up to {passes} times ({read} B per element) and writes a packed mask (1/8 B)"
        )
        print(f"{'':24}{'ms':>10}{'peak extra B/el':>18}")
        for name, time in ms.items():
            held = extra[name]
            memory = "not known" if held is None else f"{held / options.numel:.2f}"
            print(f"{name:24}{time:10.1f}{memory:>18}")
        figures += [
            (f"topk_{short}_vs_{name.removeprefix('torch.')}", ms[ours] / ms[name], 1.0)
            for name in runs
            if name != ours
        ]
        goal = GPU_GOALS[dtype] if (device.type, options.numel) == ("cuda", LARGE) else None
        figures.append((f"topk_{short}_ms", ms[ours], goal))
    for name, value, goal in figures:
        print_figure(name, value, goal)


def _runs(scores: torch.Tensor, k: int) -> dict[str, Callable[[], object]]:
    return {
        "select_top_k": lambda: select_top_k([scores], [0], ["w"], k, replicated=True),
        "torch.kthvalue": lambda: scores.kthvalue(scores.numel() - k + 1),
        "torch.topk": lambda: scores.topk(k, sorted=False),
        "torch.sort": scores.sort,
    }


if __name__ == "__main__":
    main(arguments("top-k selection against torch's").parse_args())
