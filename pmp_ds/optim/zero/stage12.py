"""Stages 1 and 2: one flat per parameter group, padded at its end on the last ranks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.runtime.utils import all_gather_dp_groups

from pmp_ds import dist
from pmp_ds.optim.zero.partitioned import Partitioned
from pmp_ds.optim.zero.shards import Fragment, forget

_FIRST_MICRO_STEP = -1  # INITIAL_MICRO_STEP_ID of DeepSpeed: micro-batches count from 0


class Stage12(Partitioned):
    norm_dtype = torch.float32

    def __init__(self, zero: Any, names: Mapping[torch.Tensor, str]) -> None:
        flats = zero.single_partition_of_fp32_groups
        found = []
        for flat, group in enumerate(zero.bit16_groups):
            for param in group:
                mapping = param._hp_mapping
                if mapping is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    found.append(Fragment(names[param], here.start, here.numel, flat, there.start))
        self._wait_for_copies = zero._wait_for_offload_copies
        super().__init__(zero, flats, found, range(len(flats)), offloaded=bool(zero.cpu_offload))

    def weights(self) -> list[torch.Tensor] | None:
        if not self._has_master:
            return None
        return [f.of(self._half(f.flat)) for f in self.fragments]

    def _half(self, flat: int) -> torch.Tensor:
        """The rank's partition in the training dtype, on the device of the flats."""
        zero = self._zero
        if self._offloaded:
            half: torch.Tensor = zero.param_buffer_of_bit16_for_cpu_offload_groups[flat]
            return half.detach()
        half = zero.parallel_partitioned_bit16_groups[flat][dist.rank()]
        return half.detach()

    def drop_fp32_master(self) -> None:
        for i, flat in enumerate(self.flats):
            half = self._half(i)
            half.copy_(flat.data)
            flat.data = half
            for param in self._zero.bit16_groups[i]:
                if (mapping := param._hp_mapping) is not None:  # it would keep the fp32 memory
                    there = mapping.hp_fragment_address
                    mapping.hp_fragment = half.narrow(0, there.start, there.numel)
        self._has_master = False

    def replace_step(self, step: Any) -> None:
        super().replace_step(step)
        zero = self._zero
        if zero.overlap_comm and zero.reduction_stream is not None:  # None on CPU
            end = zero.independent_gradient_partition_epilogue
            zero.independent_gradient_partition_epilogue = lambda: self._end_backward(end)
        if self._offloaded:  # DeepSpeed leaves the buffer empty before its own first step
            for i, flat in enumerate(self.flats):
                self._half(i).copy_(flat.data)
            # It asks of every parameter's gradient whether it overflowed, and for its norm.
            self._zero.update_offload_overflow_tracker_for_param_grad = lambda param: None
            self._zero.set_norm_for_param_grad_in_gpu = lambda param: None
            if self._zero.cpu_offload_pin_memory:
                # It stops the host for every parameter, in case that the memory is pageable.
                self._zero._wait_for_offload_copies = self._order_copies

    def _end_backward(self, end: Callable[[], None]) -> None:
        """Do what DeepSpeed does after a backward pass whose reductions ran beside it. It would
        stop the host, and free memory of the reductions' stream that this one still reads."""
        zero, stream = self._zero, torch.cuda.current_stream()
        zero.reduce_ipg_grads()
        stream.wait_stream(zero.reduction_stream)
        kept = [getattr(g, "flat_partition", None) for g in zero.averaged_gradients.values()]
        for gradients in (zero.grads_in_partition, *kept):
            if gradients is not None:
                gradients.record_stream(stream)
        zero._clear_previous_reduced_grads()
        zero.overlap_comm = False  # nothing is left that could overlap
        end()
        zero.overlap_comm = True

    def _order_copies(self) -> None:
        for event in self._zero._pending_offload_events.values():
            event.wait()

    def wait_for_gradients(self) -> None:
        self._wait_for_copies()

    def free(self) -> None:
        forget(self._zero, [param for group in self._zero.bit16_groups for param in group])

    def before_step(self) -> None:
        self._zero.micro_step_id = _FIRST_MICRO_STEP
        self._zero.overflow = False
        self.wait_for_gradients()
        if self._offloaded:
            self._zero._offload_accumulated_param_ids = set()

    def after_step(self) -> None:
        zero = self._zero
        if self._offloaded:
            for i, partitions in enumerate(zero.parallel_partitioned_bit16_groups):
                partitions[dist.rank()].data.copy_(self._half(i), non_blocking=True)
        self._free_gradients()
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )
        for i in range(len(zero.bit16_groups)):
            zero._update_model_bit16_weights(i)

    def discard(self) -> None:
        self._free_gradients()

    def _free_gradients(self) -> None:
        zero = self._zero
        zero._release_preflattened_grad_buffers()
        if self._offloaded:
            zero.reset_cpu_buffers()
        for i in range(len(zero.bit16_groups)):
            if not self._offloaded:
                zero.free_grad_in_param_list(zero.params_not_in_partition[i])
                zero.free_grad_in_param_list(zero.params_in_partition[i])
                zero.all_grad_tensors[i] = None
            zero.averaged_gradients[i] = None
