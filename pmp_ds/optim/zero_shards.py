"""Map the elements that a rank owns under each ZeRO stage to their parameters.

Only this file reads private attributes of DeepSpeed's ZeRO (tests/unit/optim/test_contract.py);
its comments describe DeepSpeed 0.19.8. A *flat* is a tensor that the client optimizer steps: at
stage 0 a whole parameter or its fp32 clone, at stages 1 and 2 the rank's partition of a parameter
group, at stage 3 that of a sub-group. A *fragment* is a run of elements of one parameter inside
one flat. A flat may also hold padding, which belongs to no fragment.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from pmp_ds import dist
from pmp_ds.ticket.mask import ParamMask, pack


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a parameter, at [flat_start, flat_start + numel) of a
    flat; indices are row-major."""

    name: str
    start: int
    numel: int
    flat: int  # index into ZeroShards.flats
    flat_start: int


SetFactor = Callable[[torch.Tensor], None]


class ZeroShards(Protocol):
    """This rank's share of the model."""

    @property
    def flats(self) -> Sequence[torch.Tensor]:
        """The fp32 tensors that the client optimizer steps."""
        ...

    @property
    def fragments(self) -> Sequence[Fragment]:
        """The fragments, in flat order."""
        ...

    @property
    def replicated(self) -> bool:
        """Whether every rank holds everything (stage 0)."""
        ...

    def gradients(self) -> list[torch.Tensor]:
        """Return the reduced gradient of each fragment times the loss scale, (numel,) each.

        They are views of the gradients that DeepSpeed will measure, clip and apply, valid between
        ``engine.backward`` at an accumulation boundary and ``engine.step``.
        """
        ...

    def zero_padding(self) -> None:
        """Clear gradients of padding, which may be uninitialised."""
        ...

    def remeasure(self) -> None:
        """Recompute the norms and overflow flags that DeepSpeed computed during reduction."""
        ...

    def drop_fp32_master(self, set_factor: SetFactor) -> None:
        """Replace the fp32 flats by the 16-bit weights themselves, once.

        Gradients then stay 16-bit, and the factor that DeepSpeed would apply to them (loss scale,
        clipping) goes to ``set_factor``.
        """
        ...


def shards_of(engine: Any) -> ZeroShards:
    """Return the shard map of a DeepSpeed engine."""
    zero = engine.optimizer
    names = engine.param_names
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return _Stage3(zero, names)
    if isinstance(zero, DeepSpeedZeroOptimizer):
        return _Stage12(zero, names)
    return _Stage0(zero, names)


class _Stage0:
    """No ZeRO: module parameters (fp32), or fp32 clones of them (bf16)."""

    replicated = True

    def __init__(self, optimizer: Any, names: Mapping[torch.Tensor, str]) -> None:
        groups = getattr(optimizer, "fp16_groups", None)
        if groups is None:  # fp32: DeepSpeed does not wrap the client optimizer
            self._params = [p for group in optimizer.param_groups for p in group["params"]]
            self.flats = list(self._params)
        else:
            self._params = [p for group in groups for p in group]
            self.flats = [p for group in optimizer.fp32_groups for p in group]
        self.fragments = [
            Fragment(names[param], 0, param.numel(), i, 0) for i, param in enumerate(self._params)
        ]

    def gradients(self) -> list[torch.Tensor]:
        return [_gradient(param).view(-1) for param in self._params]

    def zero_padding(self) -> None:
        pass

    def remeasure(self) -> None:
        pass

    def drop_fp32_master(self, set_factor: SetFactor) -> None:
        raise AssertionError("deepspeed_config refuses a compact master at stage 0")


def _gradient(param: torch.Tensor) -> torch.Tensor:
    if param.grad is None:  # the loss does not use this parameter
        param.grad = torch.zeros_like(param)
    return param.grad


class _Stage12:
    """Stages 1 and 2: one flat per parameter group, padded at its end on the last ranks."""

    replicated = False

    def __init__(self, zero: Any, names: Mapping[torch.Tensor, str]) -> None:
        self._zero = zero
        self.flats = list(zero.single_partition_of_fp32_groups)
        found = []
        for flat, group in enumerate(zero.bit16_groups):
            for param in group:
                mapping = param._hp_mapping
                if mapping is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    name = names[param]
                    found.append((Fragment(name, here.start, here.numel, flat, there.start), param))
        found.sort(key=lambda pair: (pair[0].flat, pair[0].flat_start))
        self.fragments = [fragment for fragment, _ in found]
        self._params = [param for _, param in found]

    def gradients(self) -> list[torch.Tensor]:
        flats = []
        for i, flat in enumerate(self.flats):
            if self._zero.cpu_offload:
                flats.append([_gradient(flat).view(-1)])
            else:
                flats.append(_pieces(self._zero.averaged_gradients[i]))
        return [_slice(flats[f.flat], f.flat_start, f.numel) for f in self.fragments]

    def zero_padding(self) -> None:
        pass  # DeepSpeed fills padding of averaged_gradients with zeros at these stages

    def remeasure(self) -> None:
        # Without offload, DeepSpeed computes norm and overflow in `step`, from the masked gradient.
        if self._zero.cpu_offload:
            finite = _remeasure_norms(self._zero, self._params, self.gradients())
            self._zero.local_overflow = not finite

    def drop_fp32_master(self, set_factor: SetFactor) -> None:
        zero = self._zero
        for i, flat in enumerate(self.flats):
            if zero.cpu_offload:
                half = zero.param_buffer_of_bit16_for_cpu_offload_groups[i]
                half.copy_(flat.data)
            else:
                half = zero.parallel_partitioned_bit16_groups[i][dist.rank()]
            flat.data = half.data
        zero.unscale_and_clip_grads = lambda _, norm: set_factor(_factor(zero, norm))


class _Stage3:
    """Stage 3: every parameter is split over the ranks; one flat per sub-group, with padding after
    each parameter."""

    replicated = False

    def __init__(self, zero: Any, names: Mapping[torch.Tensor, str]) -> None:
        self._zero = zero
        self.flats = list(zero.fp32_partitioned_groups_flat)
        found, self._padding = [], []
        for group in zero.fp16_groups:
            for param in group:
                flat, flat_start, partition = zero.grad_position[zero.get_param_id(param)]
                start = min(dist.rank() * partition, param.ds_numel)
                numel = min(partition, param.ds_numel - start)
                if numel:
                    found.append((Fragment(names[param], start, numel, flat, flat_start), param))
                if numel < partition:
                    self._padding.append((flat, flat_start + numel, partition - numel))
        found.sort(key=lambda pair: (pair[0].flat, pair[0].flat_start))
        self.fragments = [fragment for fragment, _ in found]
        self._params = [param for _, param in found]

    def _flat_gradients(self) -> list[list[torch.Tensor]]:
        if self._zero.offload_optimizer:
            return [[_gradient(flat).view(-1)] for flat in self.flats]
        return [_pieces(self._zero.averaged_gradients[i]) for i in range(len(self.flats))]

    def gradients(self) -> list[torch.Tensor]:
        flats = self._flat_gradients()
        return [_slice(flats[f.flat], f.flat_start, f.numel) for f in self.fragments]

    def zero_padding(self) -> None:
        flats = self._flat_gradients()
        for flat, start, numel in self._padding:
            _slice(flats[flat], start, numel).zero_()

    def remeasure(self) -> None:
        # Without offload, DeepSpeed computes norm and overflow in `step`, from the masked gradient.
        if self._zero.offload_optimizer:
            finite = _remeasure_norms(self._zero, self._params, self.gradients())
            # `has_overflow` reads this buffer, which still holds the unmasked gradients.
            self._zero.grad_partitions_flat_buffer.zero_()
            self._zero.inf_or_nan_tracker.fill_(not finite)

    def drop_fp32_master(self, set_factor: SetFactor) -> None:
        zero = self._zero
        for flat, half in zip(self.flats, zero.fp16_partitioned_groups_flat, strict=True):
            # Under offload this is a copy on CPU; DeepSpeed's `step` copies it back to the device.
            flat.data = half.data.to(flat.device)
        zero.unscale_and_clip_grads = lambda _, norm: set_factor(_factor(zero, norm))


def _remeasure_norms(
    zero: Any, params: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> bool:
    """Replace the norms that DeepSpeed stored during offload; return whether all are finite."""
    zero.norm_for_param_grads.clear()
    finite = True
    for param, gradient in zip(params, gradients, strict=True):
        norm = torch.linalg.vector_norm(gradient)
        zero.norm_for_param_grads[zero.get_param_id(param)] = norm
        finite = finite and bool(norm.isfinite())
    return finite


def _factor(zero: Any, norm: Any) -> torch.Tensor:
    """Return the factor of DeepSpeed's ``unscale_and_clip_grads`` for a given scaled norm."""
    combined = torch.as_tensor(float(zero.loss_scale))
    if zero.clip_grad > 0.0:
        excess = (torch.as_tensor(norm) / zero.loss_scale + 1e-6) / zero.clip_grad
        combined = zero.loss_scale * excess.float().clamp(min=1.0)
    return 1.0 / combined


def _pieces(gradients: Any) -> list[torch.Tensor]:
    """Return a flat's gradient as 1-D tensors in flat order."""
    flat = getattr(gradients, "flat_partition", None)
    return [flat.view(-1)] if flat is not None else [g.view(-1) for g in gradients]


def _slice(pieces: list[torch.Tensor], start: int, numel: int) -> torch.Tensor:
    """Return a view of elements [start, start + numel) of the concatenated pieces; all of them must
    lie in one piece."""
    for piece in pieces:
        if start < piece.numel():
            assert start + numel <= piece.numel(), "a fragment spans two gradient tensors"
            return piece[start : start + numel]
        start -= piece.numel()
    raise AssertionError("a fragment lies outside the gradient partition")


def flat_masks(
    shards: ZeroShards, mask: ParamMask | None
) -> dict[torch.Tensor, torch.Tensor | None]:
    """Return the packed mask of each flat for ``MaskedOptimizer.arm``; padding is 0."""
    if mask is None:
        return dict.fromkeys(shards.flats)
    dense = [torch.zeros(flat.numel(), dtype=torch.bool) for flat in shards.flats]
    for f in shards.fragments:
        dense[f.flat][f.flat_start : f.flat_start + f.numel] = mask.fragment(
            f.name, f.start, f.numel
        )
    return {
        flat: pack(kept).to(flat.device) for flat, kept in zip(shards.flats, dense, strict=True)
    }
