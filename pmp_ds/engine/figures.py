"""How well a model uses its device: floating-point operations by a stated formula, memory."""

import resource
from typing import Any

import torch

# Dense peak of matrix products in bf16 and fp16, FLOP/s, from the makers' data sheets. The first
# name that the device's contains counts.
_PEAK = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def flops_per_token(hf_config: Any, num_params: int, block_size: int) -> float:
    """Return 6 N + 12 L h s of one token, forward and backward: N parameters, L layers of width h,
    blocks of s tokens (Chowdhery et al., 2022, appendix B). Recomputed activations do not count."""
    layers = getattr(hf_config, "num_hidden_layers", 0) or 0
    width = getattr(hf_config, "hidden_size", 0) or 0
    return 6.0 * num_params + 12.0 * layers * width * block_size


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the device's peak in FLOP/s, or None where it is not known: on CPU, in fp32."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK.items() if part in name), None)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most bytes of host memory that this process ever had, and on a GPU the peaks of
    allocated and reserved bytes since the last call."""
    peaks = {"peak_host_memory": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device.type == "cuda":
        peaks["peak_memory_allocated"] = float(torch.cuda.max_memory_allocated(device))
        peaks["peak_memory_reserved"] = float(torch.cuda.max_memory_reserved(device))
        torch.cuda.reset_peak_memory_stats(device)
    return peaks
