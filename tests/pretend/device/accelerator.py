"""DeepSpeed's CUDA accelerator on the pretend device."""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator


class Accelerator(CUDA_Accelerator):
    """CUDA's, without what only a driver has: NVML, NVTX, Triton, registered host memory."""

    def __init__(self) -> None:
        self._name, self._communication_backend_name = "cuda", "gloo"  # the bytes' way, nccl.py
        self._compile_backend = "inductor"
        self.pynvml = None

    def is_triton_supported(self) -> bool:
        return False

    def lazy_call(self, callback: Callable[[], Any]) -> None:
        callback()

    def range_push(self, *_: Any, **__: Any) -> None:
        pass

    def range_pop(self, *_: Any, **__: Any) -> None:
        pass

    def pin_memory(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor.pin_memory()


def install() -> None:
    """Make DeepSpeed use it."""
    set_accelerator(Accelerator())
