"""Stage 3: every parameter is split over the ranks; one flat per sub-group, padded after each
parameter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from pmp_ds import dist
from pmp_ds.optim.zero.partitioned import Partitioned
from pmp_ds.optim.zero.shards import Fragment, forget

_PARTITIONED = ZeroParamStatus.NOT_AVAILABLE


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
        self._params: list[Any] = list(names)
        self._reduced: Any = None  # event of the last backward pass, on a GPU
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

    def replace_step(self, step: Any) -> None:
        super().replace_step(step)
        reducing = self._zero.reduce_and_partition_stream
        if reducing is None:  # on CPU
            return
        # DeepSpeed stops the host for this stream after each backward pass.
        reducing.synchronize = self._order_gradients
        if dist.world_size() == 1 and not self._zero.offload_param:
            for param in self._params:
                param.all_gather_coalesced = _at_once(param.all_gather_coalesced)

    def _order_gradients(self) -> None:
        self._reduced = self._zero.reduce_and_partition_stream.record_event()
        self._reduced.wait()  # the current stream, not the host

    def free(self) -> None:
        # DeepSpeed's globals hold the model: a list of its modules, and a cache of the coordinator.
        offload, module = self._zero.parameter_offload, self._zero.module
        FWD_MODULE_STACK[:] = [other for other in FWD_MODULE_STACK if other is not module]
        for held in (*module.modules(), offload.get_param_coordinator(), offload):
            vars(held).clear()
        forget(self._zero, self._params)
        self._params.clear()

    def wait_for_gradients(self) -> None:
        if self._offloaded and self._reduced is not None:
            self._reduced.synchronize()

    def before_step(self) -> None:
        self._zero._pre_step()
        self._zero.overflow = False
        self.wait_for_gradients()
        self._zero._partition_all_parameters()

    def after_step(self) -> None:
        zero = self._zero
        self._free_gradients()
        for i, half in enumerate(zero.fp16_partitioned_groups_flat):
            if self._offloaded:
                half.data.copy_(_rounded(self.flats[i], half), non_blocking=True)
            zero._unflatten_partitioned_parameters(i)
        # The end of DeepSpeed's step stops the host to gather these, before anything else is.
        kept = [p for p in zero.persistent_parameters if p.ds_status == _PARTITIONED]
        if kept:
            kept[0].all_gather_coalesced(kept).wait()
        gathering = zero.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
        if gathering is not None:
            gathering.wait_stream(torch.cuda.current_stream())

    def discard(self) -> None:
        self._free_gradients()

    def _free_gradients(self) -> None:
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        if self._offloaded:
            zero.reset_cpu_buffers()
            return
        for i in range(len(self.flats)):
            for gradient in zero.averaged_gradients[i]:
                if gradient.is_cuda:  # it was allocated on the stream that reduces
                    gradient.record_stream(torch.cuda.current_stream())
            zero.averaged_gradients[i] = None


class _Arrived:
    """The handle of a gather that has nothing to gather."""

    def __init__(self, params: Sequence[Any]) -> None:
        self._params = list(params)

    def wait(self, **options: Any) -> None:
        while self._params:  # DeepSpeed waits once per parameter, and frees some in between
            self._params.pop().ds_status = ZeroParamStatus.AVAILABLE


def _at_once(gather: Callable[..., Any]) -> Callable[..., _Arrived]:
    """Wrap the gather of a parameter on one rank, which has it whole: DeepSpeed's handles stop the
    host for each parameter."""

    def gathered(params: Sequence[Any], **options: Any) -> _Arrived:
        gather(params, **options)
        return _Arrived(params)

    return gathered


def _rounded(flat: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Return a flat in the dtype of ``half``, in memory that a GPU copies without the host."""
    rounded = torch.empty(flat.shape, dtype=half.dtype, pin_memory=half.is_cuda)
    return rounded.copy_(flat.detach())
