"""One update of many tensors: ours on the ticket against dense fused AdamW.

    python -m benchmarks.optimizer_step

Prints a table, then a line per figure; the exit code says only whether it ran. `moved` counts
each tensor once for every time an update has to read or write it.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import arguments, find_ninja, hardware, interleaved_ms, print_figure
from pmp_ds.optim.kernels import kernels_for
from pmp_ds.optim.masked_adamw import MaskedAdamW
from pmp_ds.ticket.mask import pack

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
COPY = "copy of fp32"
DENSE_BYTES = 28  # weights and two moments read and written, gradient read


def main(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    numel = options.numel
    torch.manual_seed(0)
    start = torch.randn(numel, device=device)
    gradient = torch.randn(numel, device=device)
    bits = pack(torch.rand(numel, device=device) < options.density)

    halves = gradient.bfloat16(), start.bfloat16()

    def leaf() -> torch.Tensor:
        tensor = start.clone().requires_grad_()
        tensor.grad = gradient
        return tensor

    weights = leaf()
    kernels = kernels_for([weights], master="dense")
    backend = "torch operations" if kernels is None else {"cpu": "C++"}.get(device.type, "Triton")
    masked = MaskedAdamW([weights], **HYPER)
    masked.arm({weights: bits})
    optimizers: dict[str, torch.optim.Optimizer] = {
        f"ours ({backend})": masked,
        "torch AdamW, fused": torch.optim.AdamW([leaf()], fused=True, **HYPER),
    }
    ours, torchs = optimizers
    if not options.without_deepspeed:
        try:
            optimizers.update(_deepspeed(leaf(), device))
        except Exception as error:  # noqa: BLE001 - compiled at first use: many things can be missing
            print(f"DeepSpeed's optimizer could not be built: {str(error).splitlines()[0][:200]}")
    runs: dict[str, Callable[[], object]] = {
        name: optimizer.step for name, optimizer in optimizers.items()
    }
    ours_whole, torchs_whole = "ours: norm, clip, bf16 in and out", "torch: the same in five passes"
    runs[ours_whole] = lambda: _whole(masked, halves)
    runs[torchs_whole] = lambda: _in_passes(optimizers[torchs], halves)
    spare = torch.empty_like(start)
    runs[COPY] = lambda: spare.copy_(start)
    ms = interleaved_ms(runs, device, options.repeats)

    density = options.density
    moved = dict.fromkeys(runs, float(DENSE_BYTES))
    moved[ours] = 12 + 1 / 8 + 16 * density
    moved[ours_whole] = 2 + 2 + 8 + 2 + 2 / 8 + 16 * density
    moved[torchs_whole] = 6 + 4 + 8 + DENSE_BYTES + 6
    moved[COPY] = 8
    print(f"hardware: {hardware(device)}")
    print(f"{numel} fp32 elements, density {options.density}, median of {options.repeats}")
    print(f"{'':38}{'ms':>9}{'moved B/el':>12}{'GB/s':>8}{'state B/el':>12}")
    for name, time in ms.items():
        rate = moved[name] * numel / time / 1e6
        held = f"{_state_bytes(optimizers[name]) / numel:12.2f}" if name in optimizers else ""
        print(f"{name:38}{time:9.2f}{moved[name]:12.2f}{rate:8.1f}{held}")
    on_gpu = device.type == "cuda"
    print_figure("optimizer_step_vs_torch_fused", ms[ours] / ms[torchs], 0.9 if on_gpu else 2.0)
    print_figure("optimizer_phase_vs_torch_passes", ms[ours_whole] / ms[torchs_whole], 1.0)
    rate = moved[ours_whole] / ms[ours_whole] / (moved[COPY] / ms[COPY])
    goal = 0.8 if on_gpu else None
    print_figure("optimizer_phase_of_copy_bandwidth", rate, goal, at_least=True)
    print_figure(
        "optimizer_state_vs_torch_fused",
        _state_bytes(masked) / _state_bytes(optimizers[torchs]),
        0.75,
    )


def _whole(masked: MaskedAdamW, halves: tuple[torch.Tensor, torch.Tensor]) -> None:
    gradient, weights = halves
    update = masked.update([gradient], [weights])
    norm = update.squares().sum().sqrt()
    update.make(((norm + 1e-6).reciprocal()).clamp(max=1.0).float())


def _in_passes(optimizer: torch.optim.Optimizer, halves: tuple[torch.Tensor, torch.Tensor]) -> None:
    """What a mixed-precision optimizer does around a dense fp32 step."""
    gradient, weights = halves
    (tensor,) = optimizer.param_groups[0]["params"]
    tensor.grad = gradient.float()
    norm = torch.linalg.vector_norm(tensor.grad)
    tensor.grad.mul_(((norm + 1e-6).reciprocal()).clamp(max=1.0))
    optimizer.step()
    weights.copy_(tensor.detach())


def _deepspeed(tensor: torch.Tensor, device: torch.device) -> dict[str, torch.optim.Optimizer]:
    find_ninja()
    if device.type == "cuda":
        from deepspeed.ops.adam import FusedAdam

        return {"DeepSpeed FusedAdam": FusedAdam([tensor], **HYPER)}
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return {"DeepSpeedCPUAdam": DeepSpeedCPUAdam([tensor], **HYPER)}


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    if isinstance(optimizer, MaskedAdamW):
        return optimizer.state_bytes
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


if __name__ == "__main__":
    parser = arguments("our optimizer step against dense fused AdamW")
    parser.add_argument("--without-deepspeed", action="store_true", help="skip DeepSpeed's own")
    main(parser.parse_args())
