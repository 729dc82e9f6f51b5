"""Stage 3: every parameter is split over the ranks; one flat per sub-group, padded after each
parameter."""

from collections.abc import Mapping
from typing import Any

import torch

from pmp_ds import dist
from pmp_ds.optim.zero.partitioned import Partitioned
from pmp_ds.optim.zero.shards import Fragment, forget


class Stage3(Partitioned):
    norm_dtype = torch.float64

    def __init__(self, zero: Any, names: Mapping[torch.Tensor, str]) -> None:
        flats = zero.fp32_partitioned_groups_flat
        found = []
        for group in zero.fp16_groups:
            for param in group:
                flat, flat_start, partition = zero.grad_position[zero.get_param_id(param)]
                start = min(dist.rank() * partition, param.ds_numel)
                numel = min(partition, param.ds_numel - start)
                if numel:
                    found.append(Fragment(names[param], start, numel, flat, flat_start))
        groups = [zero.sub_group_to_group_id[i] for i in range(len(flats))]
        offloaded = bool(zero.offload_optimizer)
        super().__init__(zero, flats, found, groups, offloaded=offloaded)

    def weights(self) -> list[torch.Tensor] | None:
        if self._offloaded or not self._has_master:
            return None
        halves = self._zero.fp16_partitioned_groups_flat
        return [f.of(halves[f.flat].detach()) for f in self.fragments]

    def drop_fp32_master(self) -> None:
        halves = self._zero.fp16_partitioned_groups_flat
        for flat, half in zip(self.flats, halves, strict=True):
            flat.data = half.data.to(flat.device)  # under offload a copy, which is copied back
        self._has_master = False

    def free(self) -> None:
        forget(self._zero, [param for group in self._zero.fp16_groups for param in group])

    def before_step(self) -> None:
        self._zero._pre_step()
        self._zero.overflow = False
        self._zero._partition_all_parameters()

    def after_step(self) -> None:
        zero = self._zero
        self._free_gradients()
        for i, half in enumerate(zero.fp16_partitioned_groups_flat):
            if self._offloaded:
                half.data.copy_(_rounded(self.flats[i], half), non_blocking=True)
            zero._unflatten_partitioned_parameters(i)
        zero._post_step(set())

    def discard(self) -> None:
        self._free_gradients()
        if self._offloaded:
            self._zero.reset_cpu_buffers()

    def _free_gradients(self) -> None:
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        if self._offloaded:
            return
        for i in range(len(self.flats)):
            for gradient in zero.averaged_gradients[i]:
                if gradient.is_cuda:  # it was allocated on the stream that reduces
                    gradient.record_stream(torch.cuda.current_stream())
            zero.averaged_gradients[i] = None


def _rounded(flat: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Return a flat in the dtype of ``half``, in memory that a GPU copies without the host."""
    rounded = torch.empty(flat.shape, dtype=half.dtype, pin_memory=half.is_cuda)
    return rounded.copy_(flat.detach())
