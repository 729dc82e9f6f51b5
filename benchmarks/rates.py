"""What the device can do at most: copies between two tensors, and products of matrices.

    python -m benchmarks.rates

Prints a line per figure; the exit code says only whether it ran.
"""

import argparse

import torch

from benchmarks.common import arguments, hardware, interleaved_ms, print_figure


def main(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype, width = (torch.bfloat16, 8192) if cuda else (torch.float32, 2048)
    width = min(width, options.numel)
    source = torch.ones(options.numel, device=device)
    target = torch.empty_like(source)
    factor = torch.randn(width, width, device=device, dtype=dtype)
    runs = {"copy": lambda: target.copy_(source), "product": lambda: factor @ factor}
    ms = interleaved_ms(runs, device, options.repeats)
    print(f"hardware: {hardware(device)}")
    print(f"copies of {options.numel} fp32 elements; {width} x {width} matrices, {dtype}")
    print_figure("copy_gb_per_second", copy_rate(options.numel, ms["copy"]))
    print_figure("matmul_tflops", 2 * width**3 / ms["product"] / 1e9)


def copy_rate(numel: int, ms: float) -> float:
    """Return GB/s of a copy of fp32 elements, read and written."""
    return 8 * numel / ms / 1e6


if __name__ == "__main__":
    main(arguments("bandwidth of copies, rate of matrix products").parse_args())
