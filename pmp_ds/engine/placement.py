"""Fill a model whose parameters have no memory yet, where its engine needs them.

At ZeRO 0 to 2 every rank computes with a whole replica: it is made on the device, in the training
dtype, chunk by chunk. At ZeRO 3 every rank makes only its partition, so that the whole model is
nowhere, not even one parameter of it.
"""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import (
    OffloadDeviceEnum,
    PartitionedParamStatus,
    ZeroParamStatus,
)
from torch import nn

from pmp_ds import dist
from pmp_ds.progress import Progress

Fill = Callable[[str, int, int], torch.Tensor]
"""(parameter, first element, count) -> (count,), in the training dtype or one that rounds to it."""
_CHUNK = 1 << 22  # elements
_SHOW_PROGRESS = 1 << 27  # minimum elements: a few seconds


def place(
    model: nn.Module,
    fill: Fill,
    merged: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    quiet: bool,
) -> None:
    """Give the parameters of ``model`` memory and values. ``merged``: the DeepSpeed config."""
    stage = merged.get("zero_optimization", {}).get("stage", 0)
    sizes = [param.numel() for param in model.parameters()]
    quiet = quiet or sum(sizes) < _SHOW_PROGRESS
    if stage == 3:
        init = deepspeed.zero.Init(config_dict_or_path=merged, dtype=dtype)
        sizes = [-(-numel // dist.world_size()) for numel in sizes]
    with Progress("initial weights", "element", sum(sizes), scale=True, disable=quiet) as bar:

        def filled(name: str, start: int, out: torch.Tensor) -> None:
            for i in range(0, out.numel(), _CHUNK):
                part = out[i : i + _CHUNK]
                part.copy_(fill(name, start + i, part.numel()))
                bar.update(part.numel())

        if stage == 3:
            _partition(model, filled, init, dtype)
        else:
            for name, param in _replaced(model, dtype, device):
                param.data = param.new_empty(param.pop_shape)
                del param.pop_shape
                filled(name, 0, param.data.view(-1))


def _partition(
    model: nn.Module,
    filled: Callable[[str, int, torch.Tensor], None],
    init: Any,
    dtype: torch.dtype,
) -> None:
    """Make every parameter what ``zero.Init`` makes of a whole one: empty, with this rank's
    partition in ``ds_tensor``. Written for DeepSpeed 0.19.8 (tests/unit/optim/test_contract.py)."""
    if init.mem_efficient_linear:
        init._enable_mem_efficient_linear()
    for name, param in _replaced(model, dtype, init.local_device):
        # `_convert_to_deepspeed_param` reads no more of the data than its shape.
        param.data = param.new_empty(1).expand(param.pop_shape)
        del param.pop_shape
        init._convert_to_deepspeed_param(param)
        aligned = init._aligned_size(param)
        size = aligned // init._partition_world_size(param)
        device = init.local_device if param.ds_persist else init.remote_device
        own: Any = torch.zeros(size, dtype=dtype, device=device)
        start = min(size * init._partition_rank(param), param.ds_numel)
        filled(name, start, own[: min(size, param.ds_numel - start)])
        if device == OffloadDeviceEnum.cpu and init.pin_memory:
            own = get_accelerator().pin_memory(own)
        own.requires_grad = False
        own.ds_numel, own.status, own.final_location = size, PartitionedParamStatus.AVAILABLE, None
        param.ds_tensor, param.ds_numel_aligned = own, aligned
        param.data = param.new_empty(0)
        param.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _replaced(model: nn.Module, dtype: torch.dtype, device: Any) -> list[tuple[str, Any]]:
    """Replace every parameter on the meta device by an empty one on ``device`` that remembers the
    shape; tied ones stay tied. Return them by name."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for leaf, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in made:
                new: Any = nn.Parameter(
                    torch.empty(0, dtype=dtype, device=device), requires_grad=param.requires_grad
                )
                new.pop_shape = param.shape
                made[id(param)] = new
            module._parameters[leaf] = made[id(param)]
    return list(model.named_parameters())
