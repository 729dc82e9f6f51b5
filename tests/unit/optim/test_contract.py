"""What optim/zero/, engine/engine.py and engine/portable.py assume of DeepSpeed beyond its
documented API.

One row per attribute, each checked on real engines of 2 ranks. After an upgrade of DeepSpeed this
is the first file to run: a failing row names the attribute and what is no longer true of it. Some
attributes are read or called because DeepSpeed's own ``step``, which ours stands for, does so:
`used` looks for them in its source, and ``test_step_is_deepspeeds`` compares the two.
"""

import ast
import inspect
import itertools
import math
import re
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import (
    NoGatherCoalescedHandle,
    NoGatherHandle,
    ZeroParamStatus,
)
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from pmp_ds import dist
from pmp_ds.config import TrainConfig
from pmp_ds.engine.engine import Engine
from pmp_ds.engine.portable import _SCALER
from pmp_ds.optim.masked_adamw import MaskedAdamW
from pmp_ds.optim.zero import Fragment, flat_masks, stage12
from pmp_ds.optim.zero.shards import pieces
from pmp_ds.ticket.mask import ParamMask, pack
from tests.helpers import tiny
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

REPO = Path(__file__).resolve().parents[3]
MICRO, ACCUMULATION, WORLD_SIZE = 2, 2, 2
SCALE_POWER = 8  # of the loss scale in fp16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setup:
    stage: int
    precision: str
    offload: bool = False  # of the optimizer, to CPU

    def __str__(self) -> str:
        return f"stage {self.stage} {self.precision}" + " offload" * self.offload


SETUPS = (
    *(Setup(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")),
    Setup(1, "fp16"),
    Setup(3, "fp16"),
    Setup(1, "bf16", True),
    Setup(2, "fp32", True),
    Setup(2, "fp16", True),
    Setup(3, "bf16", True),
    Setup(3, "fp16", True),
)


DAILY = (
    Setup(0, "bf16"),
    Setup(1, "fp32"),
    Setup(2, "bf16"),
    Setup(3, "fp32"),
    Setup(3, "fp16"),
    Setup(1, "bf16", True),
    Setup(3, "bf16", True),
)


def tier(setup: Setup) -> Any:
    return () if setup in DAILY else pytest.mark.nightly


@dataclass
class Probe:
    """Hold an armed engine after one ``backward``, and the expected gradient."""

    engine: Engine
    setup: Setup
    initial: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]  # reduced gradients, computed on one process in fp32
    kept: dict[str, torch.Tensor]
    steps_inside_initialize: int
    norm: float = field(default=math.nan)  # what DeepSpeed reported
    before: dict[str, int] = field(default_factory=dict)  # counters before `step`

    @property
    def stage(self) -> int:
        return self.setup.stage

    @property
    def precision(self) -> str:
        return self.setup.precision

    @property
    def ds(self) -> Any:
        return self.engine._engine

    @property
    def zero(self) -> Any:
        return self.ds.optimizer

    @property
    def fragments(self) -> list[Fragment]:
        return list(self.engine.shards.fragments)

    @property
    def tolerance(self) -> float:
        """Return the tolerance of a gradient against one computed in fp32, relative to its norm."""
        return {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}[self.precision]


def has(condition: object, what: str = "") -> None:
    if not condition:
        raise AssertionError(what)


def names(p: Probe) -> None:
    for name, param in p.ds.module.named_parameters():
        has(p.ds.param_names[param] == name, f"{name} is {p.ds.param_names.get(param)}")


def wrapper(p: Probe) -> None:
    wrappers: dict[int, type] = {
        0: MaskedAdamW if p.precision == "fp32" else FP16_UnfusedOptimizer,
        1: DeepSpeedZeroOptimizer,
        2: DeepSpeedZeroOptimizer,
        3: DeepSpeedZeroOptimizer_Stage3,
    }
    has(type(p.zero) is wrappers[p.stage], f"it is a {type(p.zero).__name__}")


def no_wrapper_at_fp32(p: Probe) -> None:
    has(not hasattr(p.zero, "fp16_groups"))
    given = {id(q) for group in p.zero.param_groups for q in group["params"]}
    has(given == {id(q) for q in p.ds.module.parameters()})


def module_groups(p: Probe) -> None:
    """fp16_groups at stage 0 and 3, bit16_groups at 1 and 2."""
    attribute = "bit16_groups" if p.stage in (1, 2) else "fp16_groups"
    found = [q for group in getattr(p.zero, attribute) for q in group]
    has(sorted(map(id, found)) == sorted(id(q) for q in p.ds.module.parameters()))


def clones(p: Probe) -> None:
    for clone_group, group in zip(p.zero.fp32_groups, p.zero.fp16_groups, strict=True):
        for clone, param in zip(clone_group, group, strict=True):
            has(clone.dtype == torch.float32)
            has(torch.equal(clone, param.float()))
    stepped = [id(q) for group in p.engine.optimizer.param_groups for q in group["params"]]
    has(stepped == [id(q) for group in p.zero.fp32_groups for q in group])


def phantom_step(p: Probe) -> None:
    wanted = 1 if p.precision == "bf16" else 0
    has(p.steps_inside_initialize == wanted, f"{p.steps_inside_initialize} steps")


def frozen_until_armed(p: Probe) -> None:
    for f in p.fragments:
        flat = p.engine.shards.flats[f.flat].detach().view(-1)
        weights = p.initial[f.name].view(-1)
        weights = weights.to(DTYPES[p.precision]).float()
        here, there = f.flat_start, f.start
        has(torch.equal(flat[here : here + f.numel], weights[there : there + f.numel]), f.name)


def one_leaf_per_group(p: Probe) -> None:
    flats = p.zero.single_partition_of_fp32_groups
    has(len(flats) == len(p.zero.bit16_groups) == len(p.engine.optimizer.param_groups))
    for flat, group in zip(flats, p.zero.bit16_groups, strict=True):
        has(flat.dtype == torch.float32)
        has(flat.dim() == 1)
        has(flat.numel() * WORLD_SIZE >= sum(q.numel() for q in group), "smaller than the group")


def one_leaf_per_sub_group(p: Probe) -> None:
    flats = p.zero.fp32_partitioned_groups_flat
    has(len(flats) == len(p.zero.fp16_groups) > 1, f"{len(flats)} sub-groups")
    has(all(flat.dtype == torch.float32 and flat.dim() == 1 for flat in flats))


def hp_mapping(p: Probe) -> None:
    for flat, group in enumerate(p.zero.bit16_groups):
        for param in group:
            if param._hp_mapping is None:
                continue
            here = param._hp_mapping.lp_fragment_address
            there = param._hp_mapping.hp_fragment_address
            has(here.numel == there.numel > 0)
            has(param._hp_mapping.hp_fragment.numel() == there.numel)
            low = param.detach().view(-1)[here.start : here.start + here.numel].float()
            whole = p.zero.single_partition_of_fp32_groups[flat]
            high = whole[there.start : there.start + there.numel]
            has(torch.equal(low, high), p.ds.param_names[param])


def grad_position(p: Probe) -> None:
    for number, group in enumerate(p.zero.fp16_groups):
        for param in group:
            flat, start, partition = p.zero.grad_position[p.zero.get_param_id(param)]
            has(flat == number, "it names another sub-group")
            has(partition * WORLD_SIZE >= param.ds_numel > (partition - 1) * WORLD_SIZE)
            has(start + partition <= p.zero.fp32_partitioned_groups_flat[flat].numel())
    positions = sorted(map(tuple, p.zero.grad_position.values()))
    for (a, start, numel), (b, after, _) in itertools.pairwise(positions):
        has(a != b or start + numel == after, "partitions overlap or leave gaps")


def ds_numel(p: Probe) -> None:
    for name, param in p.ds.module.named_parameters():
        has(param.ds_numel == p.initial[name].numel(), name)


def ds_status(p: Probe) -> None:
    states = {param.ds_status for param in p.ds.module.parameters()}
    has(states <= {ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE}, str(states))
    has(ZeroParamStatus.NOT_AVAILABLE in states, "nothing is partitioned")
    whole = dict(p.engine.parameters())
    if dist.rank() == 0:
        for name, weight in p.initial.items():
            has(torch.equal(whole[name], weight.to(whole[name].dtype)), name)


def averaged_gradients_in_flat_order(p: Probe) -> None:
    for i, flat in enumerate(p.engine.shards.flats):
        gradients = p.zero.averaged_gradients[i]
        has(isinstance(gradients, list) or hasattr(gradients, "flat_partition"))
        sizes = [piece.numel() for piece in pieces(gradients)]
        ends = [f.flat_start + f.numel for f in p.fragments if f.flat == i]
        has(max(ends, default=0) <= sum(sizes) <= flat.numel(), f"{sizes} for {flat.numel()}")


def reduced_gradients(p: Probe) -> None:
    error = scale = 0.0
    for f, found in zip(p.fragments, p.engine.shards.gradients(), strict=True):
        expected = p.expected[f.name].view(-1)[f.start : f.start + f.numel]
        error += float((found.float() / p.engine.loss_scale - expected).square().sum())
        scale += float(expected.square().sum())
    has(error <= p.tolerance**2 * scale, f"relative error {math.sqrt(error / scale):.2g}")


def gradient_on_the_leaf(p: Probe) -> None:
    """With offload; the values are those of reduced_gradients."""
    for flat in p.engine.shards.flats:
        has(flat.grad is not None and flat.grad.shape == flat.shape, "a leaf without .grad")
    reduced_gradients(p)


def offload_flag(p: Probe) -> None:
    has(bool(p.zero.cpu_offload if p.stage < 3 else p.zero.offload_optimizer) == p.setup.offload)


def updated(p: Probe) -> None:
    """The update happens although the complement held NaN: see poison()."""
    has(p.ds.skipped_steps == 0, "the update was skipped")
    moved = 0
    for f in p.fragments:
        flat = p.engine.shards.flats[f.flat].detach().view(-1)
        here = flat[f.flat_start : f.flat_start + f.numel]
        weights = p.initial[f.name].view(-1)[f.start : f.start + f.numel]
        weights = weights.to(DTYPES[p.precision]).float()
        kept = p.kept[f.name].view(-1)[f.start : f.start + f.numel]
        has(torch.equal(here[~kept], weights[~kept]), f"the complement of {f.name} moved")
        has(bool(here.isfinite().all()), f"{f.name} is not finite")
        moved += int((here[kept] != weights[kept]).sum())
    has(moved, "nothing moved")


def loss_scale_of_one(p: Probe) -> None:
    has(p.zero.loss_scale == 1, str(p.zero.loss_scale))


def dtype(p: Probe) -> None:
    has(p.zero.dtype == DTYPES[p.precision], str(p.zero.dtype))


def device(p: Probe) -> None:
    has(torch.device(p.zero.device) == p.engine.device, str(p.zero.device))


def group_of_sub_group(p: Probe) -> None:
    """Matrices decay, vectors do not."""
    for number, params in enumerate(p.zero.fp16_groups):
        group = p.engine.optimizer.param_groups[p.zero.sub_group_to_group_id[number]]
        for param in params:
            has(bool(group["weight_decay"]) == (len(param.ds_shape) >= 2), f"{param.ds_shape}")


def first_micro_step(p: Probe) -> None:
    has(stage_1_and_2.INITIAL_MICRO_STEP_ID == stage12._FIRST_MICRO_STEP)
    has("micro_step_id" in used_by_step(type(p.zero)))


def gathering(p: Probe) -> None:
    known = set(inspect.signature(all_gather_dp_groups).parameters)
    given = {"groups_flat", "partitioned_param_groups", "dp_process_group"}
    given |= {"start_alignment_factor", "allgather_bucket_size"}
    has(given <= known, str(known))
    has("all_gather_dp_groups" in inspect.getsource(type(p.zero).step))


def of_take_model_step(name: str) -> Callable[[Probe], None]:
    def check(p: Probe) -> None:
        has(name in inspect.getsource(DeepSpeedEngine._take_model_step))

    return check


def inside_nvtx(method: Any) -> Any:
    """DeepSpeed's instrument_w_nvtx wraps some, without __wrapped__."""
    return inspect.getclosurevars(method).nonlocals.get("func", method)


def source(method: Any) -> str:
    return textwrap.dedent(inspect.getsource(inside_nvtx(method)))


def reads(method: Any) -> set[str]:
    """The attributes of its object."""
    found = re.findall(r"self\.(\w+)", source(method))
    return set(found)


def used_by_step(kind: type) -> set[str]:
    """The attributes that DeepSpeed's own ``step``, or a method that it calls, reads or sets."""
    found: set[str] = set()
    waiting, seen = ["step"], set()
    while waiting:
        method = getattr(kind, waiting.pop(), None)
        if not inspect.isfunction(method):
            continue
        method = inside_nvtx(method)
        if method in seen:
            continue
        seen.add(method)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                found.add(node.attr)
                waiting.append(node.attr)
    return found


def of_one_parameter(name: str) -> Callable[[Probe], None]:
    """The step replaces the method, so look at the class."""

    def check(p: Probe) -> None:
        method = getattr(type(p.zero), name)
        has(len(inspect.signature(method).parameters) == 2, "self and the parameter")
        has(any(f".{name}(" in inspect.getsource(caller) for caller in methods(type(p.zero))))

    return check


def methods(kind: type) -> list[Any]:
    return [value for value in vars(kind).values() if inspect.isfunction(value)]


def used(name: str) -> Callable[[Probe], None]:
    def check(p: Probe) -> None:
        has(hasattr(p.zero, name), "it is gone")
        has(name in used_by_step(type(p.zero)), "DeepSpeed's own step does not use it any more")

    return check


def scale(p: Probe) -> None:
    scaler = p.zero.loss_scaler
    has(p.zero.loss_scale == scaler.cur_scale == 2.0**SCALE_POWER, str(p.zero.loss_scale))
    has(all(isinstance(getattr(scaler, name), int | float) for name in _SCALER))


def norm_is_of_the_masked_gradient(p: Probe) -> None:
    masked = [gradient[p.kept[name]] for name, gradient in p.expected.items()]
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in masked))
    has(abs(p.norm - expected) <= p.tolerance * expected, f"{p.norm}, expected {expected}")


def counters(p: Probe) -> None:
    now = {name: getattr(p.ds, name) for name in p.before}
    grown = {name: now[name] - p.before[name] for name in now}
    has(grown["global_steps"] == 1, str(grown))
    has(now["micro_steps"] == ACCUMULATION, str(now))
    has(grown["global_samples"] == MICRO * ACCUMULATION * WORLD_SIZE, str(grown))
    has(p.ds.gradient_accumulation_steps() == ACCUMULATION)
    has(p.ds.train_batch_size() == MICRO * ACCUMULATION * WORLD_SIZE)


def waits_after_backward(p: Probe) -> None:
    text = source(type(p.zero).independent_gradient_partition_epilogue)
    has(text.count("synchronize()") == 1, "waits in other ways")
    has("self.reduce_and_partition_stream.synchronize()" in text)
    has(p.zero.reduce_and_partition_stream is None, "a stream on CPU")


def end_of_step(p: Probe) -> None:
    """NVMe and ZeRO++ are refused, timers and the log are DeepSpeed's own."""
    refused = {"swap_optimizer", "optimizer_swapper", "invalidate_secondary_tensor"}
    ours = {"offload_optimizer", "reset_cpu_buffers", "persistent_parameters"}
    found = reads(type(p.zero)._post_step)
    has(found == ours | refused | {"timers"}, str(found))
    has(all(param.ds_persist for param in p.zero.persistent_parameters))


def handles_of_one_rank(p: Probe) -> None:
    for handle in (NoGatherHandle, NoGatherCoalescedHandle):
        text = source(handle.wait)
        has("ds_status = ZeroParamStatus.AVAILABLE" in text)
        calls = set(re.findall(r"(\w+)\(", text)) - {"wait", "ds_summary"}
        stops = {"get_accelerator", "resolves_data_dependency", "current_stream", "synchronize"}
        has(calls == stops, str(calls))
    for param in p.ds.module.parameters():
        has("params" in inspect.signature(inside_nvtx(param.all_gather_coalesced)).parameters)


def gathering_stream(p: Probe) -> None:
    offload = p.zero.parameter_offload
    stream = vars(offload)["_DeepSpeedZeRoOffload__allgather_stream"]
    has(stream is None, "a stream on CPU")
    has("allgather_stream=self.__allgather_stream" in inspect.getsource(type(offload).__init__))
    has(any(p.ds.module is held for held in FWD_MODULE_STACK), "its globals hold the model")
    has(isinstance(offload.get_param_coordinator(), PartitionedParameterCoordinator))


def offload_param_flag(p: Probe) -> None:
    has(p.zero.offload_param is False, str(p.zero.offload_param))


def pending_copies(p: Probe) -> None:
    zero = type(p.zero)
    has(p.zero._pending_offload_events == {}, "events on CPU")
    has(reads(zero._wait_for_offload_copies) == {"_pending_offload_events"})
    has("_pending_offload_events[stream] = event" in source(zero._record_offload_copy))
    has("_wait_for_offload_copies" in reads(zero.async_accumulate_grad_in_cpu_via_gpu))
    has(p.zero.cpu_offload_pin_memory == p.ds.zero_offload_optimizer().pin_memory)


def end_of_overlapping_backward(p: Probe) -> None:
    zero = type(p.zero)
    text = source(zero.independent_gradient_partition_epilogue)
    body = text.split("if self.overlap_comm:\n")
    has(len(body) == 2, "overlap_comm decides more")
    has(re.findall(r"(\w+)\(\)", body[1].split("\n\n")[0]) == END_OF_OVERLAP, body[1])
    has("self.reduce_ipg_grads()" in body[0])
    caller = zero.overlapping_partition_gradients_reduce_epilogue
    has(reads(caller) == {"independent_gradient_partition_epilogue"})
    has("self.grads_in_partition = torch.empty(" in source(zero.copy_grads_in_partition))
    has("stream = self.reduction_stream" in source(zero.reduce_ipg_grads))
    has(p.zero.reduction_stream is None, "a stream on CPU")
    has(p.zero.overlap_comm is False, str(p.zero.overlap_comm))


END_OF_OVERLAP = [
    "get_accelerator",
    "resolves_data_dependency",
    "get_accelerator",
    "synchronize",
    "_clear_previous_reduced_grads",
]
AFTER_STEP = (counters, norm_is_of_the_masked_gradient, updated)


@dataclass(frozen=True)
class Row:
    """State an ``assumption`` about ``attribute`` that must be true in the setups that ``where``
    selects."""

    attribute: str
    where: Callable[[Setup], bool]
    assumption: str
    check: Callable[[Probe], None]


def at(*stages: int, offload: bool | None = None, **fixed: str) -> Callable[[Setup], bool]:
    return lambda s: (
        s.stage in stages
        and offload in (None, s.offload)
        and fixed.get("precision", s.precision) == s.precision
    )


ALL, ZERO = at(0, 1, 2, 3), at(1, 2, 3)


def WRAPPED(setup: Setup) -> bool:
    return setup.precision == "bf16" or (setup.precision == "fp32" and setup.stage > 0)


USED_BY_STEP: tuple[tuple[Callable[[Setup], bool], tuple[str, ...]], ...] = (
    (at(0, precision="bf16"), ("_update_scale",)),
    (
        at(1, 2),
        (
            "_update_scale",
            "_wait_for_offload_copies",
            "_release_preflattened_grad_buffers",
            "reset_cpu_buffers",
            "free_grad_in_param_list",
            "params_in_partition",
            "params_not_in_partition",
            "all_grad_tensors",
            "bit16_groups_flat",
            "real_dp_process_group",
            "nccl_start_alignment_factor",
            "allgather_bucket_size",
            "_update_model_bit16_weights",
        ),
    ),
    (at(1, 2, offload=True), ("_offload_accumulated_param_ids",)),
    (
        at(3),
        (
            "_update_scale",
            "_pre_step",
            "_partition_all_parameters",
            "zero_grad",
            "reset_cpu_buffers",
            "_unflatten_partitioned_parameters",
        ),
    ),
)
"""What our step does as DeepSpeed's does it."""


def clip_norm(p: Probe) -> None:
    has(p.ds.gradient_clipping() == 0.01, str(p.ds.gradient_clipping()))


def clip_grad(p: Probe) -> None:
    has(p.zero.clip_grad == p.ds.gradient_clipping(), f"it is {p.zero.clip_grad}")


def halves(p: Probe) -> None:
    if p.stage == 3:
        found = p.zero.fp16_partitioned_groups_flat
    else:
        found = [group[dist.rank()] for group in p.zero.parallel_partitioned_bit16_groups]
    for half, leaf in zip(found, p.engine.shards.flats, strict=True):
        has(torch.equal(half, leaf.detach().to(half.dtype)))


def offload_buffer(p: Probe) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[p.precision]
    for half, leaf in zip(
        p.zero.param_buffer_of_bit16_for_cpu_offload_groups, p.engine.shards.flats, strict=True
    ):
        has(half.shape == leaf.shape and half.dtype == dtype, f"{half.shape}, {half.dtype}")


CONTRACT = (
    Row("engine.param_names", ALL, "maps every parameter to its name", names),
    Row("engine.optimizer", ALL, "is the wrapper that the shard map expects", wrapper),
    Row("initialize", at(0), "steps the client once in bf16, never in fp32", phantom_step),
    Row(
        "initialize",
        ALL,
        "leaves the weights alone while the client does nothing",
        frozen_until_armed,
    ),
    Row(
        "optimizer.param_groups",
        at(0, precision="fp32"),
        "holds the module's parameters; there are no fp16_groups",
        no_wrapper_at_fp32,
    ),
    Row("optimizer.fp16_groups", at(0, precision="bf16"), "the module's parameters", module_groups),
    Row(
        "optimizer.fp32_groups",
        at(0, precision="bf16"),
        "fp32 clones, parallel to fp16_groups; they are stepped",
        clones,
    ),
    Row("Parameter.grad", at(0), "reduced and averaged after backward", reduced_gradients),
    Row("zero.bit16_groups", at(1, 2), "the module's parameters, a list per group", module_groups),
    Row(
        "zero.single_partition_of_fp32_groups",
        at(1, 2),
        "one flat fp32 leaf per group",
        one_leaf_per_group,
    ),
    Row(
        "Parameter._hp_mapping",
        at(1, 2),
        "None, or lp_fragment_address in the parameter and hp_fragment_address in the leaf",
        hp_mapping,
    ),
    Row(
        "zero.update_offload_overflow_tracker_for_param_grad",
        at(1, 2, offload=True),
        "called with each reduced parameter, only to find overflows",
        of_one_parameter("update_offload_overflow_tracker_for_param_grad"),
    ),
    Row(
        "zero.set_norm_for_param_grad_in_gpu",
        at(1, 2, offload=True),
        "called with each reduced parameter, only for the norm",
        of_one_parameter("set_norm_for_param_grad_in_gpu"),
    ),
    Row("zero.fp16_groups", at(3), "the module's parameters, a list per sub-group", module_groups),
    Row(
        "zero.fp32_partitioned_groups_flat",
        at(3),
        "one flat fp32 leaf per sub-group",
        one_leaf_per_sub_group,
    ),
    Row(
        "zero.grad_position",
        at(3),
        "sub-group, start in its leaf, partition size ceil(numel / world size)",
        grad_position,
    ),
    Row("zero.get_param_id", at(3), "is the key of grad_position", grad_position),
    Row("Parameter.ds_numel", at(3), "the whole parameter's number of elements", ds_numel),
    Row("Parameter.ds_status", at(3), "AVAILABLE inside GatheredParameters", ds_status),
    Row(
        "zero.averaged_gradients",
        at(1, 2, 3, offload=False),
        "by leaf: a list in flat order, or has flat_partition; no longer than the leaf",
        averaged_gradients_in_flat_order,
    ),
    Row(
        "zero.averaged_gradients",
        at(1, 2, 3, offload=False),
        "after backward, reduced and averaged over ranks and accumulation steps",
        reduced_gradients,
    ),
    Row(
        "zero.reduce_and_partition_stream",
        at(3),
        "synchronized after a backward pass, so that gradients can be read",
        waits_after_backward,
    ),
    Row(
        "zero.persistent_parameters",
        at(3),
        "gathered by the end of DeepSpeed's step, which does nothing else that we need",
        end_of_step,
    ),
    Row(
        "Parameter.all_gather_coalesced",
        at(3),
        "returns a handle to wait for, which on one rank only sets ds_status",
        handles_of_one_rank,
    ),
    Row("zero.offload_param", at(3), "tells whether weights are offloaded", offload_param_flag),
    Row(
        "zero.parameter_offload",
        at(3),
        "has the stream and the coordinator that gather",
        gathering_stream,
    ),
    *(
        Row(
            f"zero.{name}",
            at(1, 2, offload=True),
            "pageable copies: the host waits before it accumulates another gradient",
            pending_copies,
        )
        for name in ("_pending_offload_events", "cpu_offload_pin_memory")
    ),
    *(
        Row(
            f"zero.{name}",
            at(1, 2),
            "with overlap_comm, the end of a backward pass waits for its reductions",
            end_of_overlapping_backward,
        )
        for name in (
            "overlap_comm",
            "reduction_stream",
            "independent_gradient_partition_epilogue",
            "reduce_ipg_grads",
            "grads_in_partition",
            "_clear_previous_reduced_grads",
        )
    ),
    Row("zero.cpu_offload", at(1, 2), "tells whether the optimizer is offloaded", offload_flag),
    Row("zero.offload_optimizer", at(3), "tells whether the optimizer is offloaded", offload_flag),
    Row(
        "leaf.grad",
        at(1, 2, 3, offload=True),
        "after backward, reduced and averaged over ranks and accumulation steps",
        gradient_on_the_leaf,
    ),
    Row("engine.step", ALL, "applies the update when what is kept is finite", updated),
    Row(
        "engine.get_global_grad_norm",
        ALL,
        "the norm over all ranks of the reduced gradients at step, before clipping",
        norm_is_of_the_masked_gradient,
    ),
    Row(
        "optimizer.loss_scale",
        at(1, 2, 3, precision="fp16"),
        "the factor of the reduced gradients",
        reduced_gradients,
    ),
    Row(
        "optimizer.loss_scaler", at(1, 2, 3, precision="fp16"), "has the counters of _SCALER", scale
    ),
    Row("optimizer.loss_scale", WRAPPED, "1 but in fp16", loss_scale_of_one),
    Row("engine.gradient_clipping", ALL, "the largest norm", clip_norm),
    Row("zero.clip_grad", ZERO, "the largest norm", clip_grad),
    Row("zero.dtype", ZERO, "the training dtype", dtype),
    Row("zero.device", ZERO, "where collectives are made", device),
    Row("zero.sub_group_to_group_id", at(3), "the parameter group of each", group_of_sub_group),
    Row(
        "optimizer.step", ALL, "called by engine.step", of_take_model_step("self.optimizer.step()")
    ),
    Row(
        "engine.clip_fp32_gradients",
        at(0, precision="fp32"),
        "called by engine.step, before optimizer.step",
        of_take_model_step("self.clip_fp32_gradients()"),
    ),
    Row(
        "optimizer._global_grad_norm",
        ALL,
        "what engine.get_global_grad_norm returns after a step",
        of_take_model_step("self._global_grad_norm = self.optimizer._global_grad_norm"),
    ),
    Row(
        "optimizer.overflow",
        ALL,
        "whether engine.step counts a skipped one",
        of_take_model_step("overflow = self.optimizer.overflow"),
    ),
    Row("zero.micro_step_id", at(1, 2), "INITIAL_MICRO_STEP_ID between steps", first_micro_step),
    Row("utils.all_gather_dp_groups", at(1, 2), "gives all ranks the weights", gathering),
    *(
        Row(f"zero.{name}", where, "used by DeepSpeed's own step", used(name))
        for where, names_used in USED_BY_STEP
        for name in names_used
    ),
    Row(
        "zero.parallel_partitioned_bit16_groups",
        at(1, 2),
        "[group][rank]: the leaf, rounded",
        halves,
    ),
    Row("zero.fp16_partitioned_groups_flat", at(3), "[sub-group]: the leaf, rounded", halves),
    Row(
        "zero.param_buffer_of_bit16_for_cpu_offload_groups",
        at(1, 2, offload=True),
        "[group]: as large as the leaf, in the training dtype",
        offload_buffer,
    ),
    Row("engine.global_steps", ALL, "counts updates", counters),
    Row("engine.micro_steps", ALL, "counts micro-batches", counters),
    Row("engine.global_samples", ALL, "counts samples", counters),
)

# Parts of rows above, and DeepSpeed's documented API.
INSIDE = {
    "lp_fragment_address",
    "hp_fragment_address",
    "hp_fragment",
    "start",
    "numel",
    "flat_partition",
}
DOCUMENTED = {
    "module",
    "device",
    "optimizer",
    "train",
    "eval",
    "backward",
    "step",
    "destroy",
    "gradient_accumulation_steps",
    "train_batch_size",
    "bfloat16_enabled",
    "fp16_enabled",
    "empty_partition_cache",
    "config",
}


def batches() -> list[torch.Tensor]:
    """Return the share of each rank."""
    return [tiny.batch(rank, MICRO * ACCUMULATION) for rank in range(WORLD_SIZE)]


def expected_gradients(precision: str) -> dict[str, torch.Tensor]:
    model = tiny.model()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.to(DTYPES[precision]))
    blocks = torch.cat(batches())
    logits = model(input_ids=blocks, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def poison(p: Probe) -> None:
    """Put NaN into the gradient of the complement."""
    for f, gradient in zip(p.fragments, p.engine.shards.gradients(), strict=True):
        kept = p.kept[f.name].view(-1)[f.start : f.start + f.numel]
        gradient.masked_fill_(~kept, torch.nan)


def examine(setup: Setup) -> dict[str, Any]:
    """Check every row of this setup on this rank; return row number to failure."""
    config = TrainConfig(
        steps=10,
        warmup_steps=0,
        lr=1e-3,
        clip_norm=0.01,
        precision=setup.precision,
        global_batch_size=MICRO * ACCUMULATION * WORLD_SIZE,
        micro_batch_size=MICRO,
    )
    ds_json = tiny.ds_json(setup.stage)
    if setup.offload:
        ds_json["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if setup.precision == "fp16":
        ds_json["fp16"] = {"initial_scale_power": SCALE_POWER}
    calls = 0
    original = MaskedAdamW.step

    def counted(self, closure=None):
        nonlocal calls
        calls += 1
        return original(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedAdamW, "step", counted)
        # CPU computes it, DeepSpeed denies it
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        engine = Engine(tiny.model(), config, ds_json)
    initial = {name: param.detach() for name, param in tiny.model().named_parameters()}
    generator = torch.Generator().manual_seed(5)
    kept = {n: torch.rand(w.shape, generator=generator) < 0.7 for n, w in initial.items()}
    expected = expected_gradients(setup.precision)
    probe = Probe(engine, setup, initial, expected, kept, calls)
    engine.arm(
        ParamMask(
            bits={name: pack(mask) for name, mask in kept.items()},
            shapes={name: tuple(mask.shape) for name, mask in kept.items()},
        )
    )
    counted_by = ("global_steps", "micro_steps", "global_samples")
    probe.before = {name: getattr(probe.ds, name) for name in counted_by}
    engine.backward(batches()[dist.rank()])
    problems = _check(probe, after_step=False)
    poison(probe)
    probe.norm = float(engine.step(1e-3))
    problems |= _check(probe, after_step=True)
    spans = [(f.name, f.start, f.numel) for f in probe.fragments]
    engine.close()
    return {"problems": problems, "spans": spans}


def _check(probe: Probe, *, after_step: bool) -> dict[int, str]:
    problems = {}
    for number, row in enumerate(CONTRACT):
        if row.where(probe.setup) and (row.check in AFTER_STEP) == after_step:
            try:
                row.check(probe)
            except Exception:  # noqa: BLE001  an attribute that is gone raises anything
                problems[number] = traceback.format_exc(limit=-2)
    return problems


@pytest.fixture(scope="module")
def examined(ranks2) -> Callable[[Setup], list[dict[str, Any]]]:
    done: dict[Setup, list[dict[str, Any]]] = {}

    def get(setup: Setup) -> list[dict[str, Any]]:
        if setup not in done:
            done[setup] = ranks2.run(examine, setup)
        return done[setup]

    return get


@pytest.mark.parametrize(
    ("setup", "number"),
    [
        pytest.param(setup, number, id=f"{setup}-{row.attribute}-{number}", marks=tier(setup))
        for setup in SETUPS
        for number, row in enumerate(CONTRACT)
        if row.where(setup)
    ],
)
def test_contract(examined, setup, number):
    row = CONTRACT[number]
    for rank, result in enumerate(examined(setup)):
        if (problem := result["problems"].get(number)) is not None:
            pytest.fail(
                f"{row.attribute} at {setup}, rank {rank}: a DeepSpeed upgrade changed what "
                "pmp_ds/optim/zero/ or pmp_ds/engine/ rely on: "
                f"{row.assumption}\n{problem}"
            )


@pytest.mark.parametrize(
    "setup", [pytest.param(setup, id=str(setup), marks=tier(setup)) for setup in SETUPS]
)
def test_every_element_is_owned_once(examined, setup):
    """By one rank at stages 1 to 3, by every rank at stage 0."""
    sizes = {name: param.numel() for name, param in tiny.model().named_parameters()}
    owners = {name: torch.zeros(size, dtype=torch.int) for name, size in sizes.items()}
    for result in examined(setup):
        for name, start, numel in result["spans"]:
            owners[name][start : start + numel] += 1
    times = WORLD_SIZE if setup.stage == 0 else 1
    for name, count in owners.items():
        assert bool((count == times).all()), (
            f"{name} at {setup}: the fragments do not partition it; a DeepSpeed upgrade changed "
            "_hp_mapping, grad_position, bit16_groups or fp16_groups"
        )


def relied_on(file: str, roots: set[str]) -> set[str]:
    """Return the attributes read from DeepSpeed's objects, and strings in getattr."""
    found = set()
    for node in ast.walk(ast.parse((REPO / file).read_text(encoding="utf-8"))):
        match node:
            case ast.Attribute(value=value, attr=attribute):
                if ast.unparse(value) in roots or attribute.startswith(("_hp", "ds_")):
                    found.add(attribute)
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                found.add(name)
    return found


def test_table_is_complete():
    """Code that relies on another attribute must add a row."""
    found = set()
    for path in sorted((REPO / "pmp_ds/optim/zero").glob("*.py")):
        roots = {"zero", "self._zero", "self._engine", "engine", "mapping", "here", "there"}
        found |= relied_on(str(path.relative_to(REPO)), roots)
    for file in ("pmp_ds/engine/engine.py", "pmp_ds/engine/portable.py"):
        roots = {"self._engine", "self._engine.optimizer", "engine", "engine.optimizer"}
        found |= relied_on(file, roots | {"self._scaler"})
    assert {"bit16_groups", "grad_position", "clip_fp32_gradients", "reduction_stream"} <= found
    named = {row.attribute.rpartition(".")[2] for row in CONTRACT} | INSIDE | DOCUMENTED
    assert not found - named, "relied on, and without a row in CONTRACT"


def three_updates(
    stage: int, precision: str, masked: bool, own_step: bool
) -> dict[str, torch.Tensor]:
    """This rank's weights, masters and moments after three updates: by our step, or by the step of
    DeepSpeed around the same optimizer, with the complement's gradients zeroed by hand."""
    config = TrainConfig(
        steps=3,
        warmup_steps=0,
        lr=1e-3,
        weight_decay=0.1,
        clip_norm=0.01,
        precision=precision,
        global_batch_size=MICRO * ACCUMULATION * WORLD_SIZE,
        micro_batch_size=MICRO,
    )
    engine = Engine(tiny.model(), config, tiny.ds_json(stage))
    kept: dict[str, torch.Tensor] = {}
    for name, param in tiny.model().named_parameters():
        generator = torch.Generator().manual_seed(len(kept))
        kept[name] = torch.rand(param.shape, generator=generator) < 0.7
    bits = {name: pack(mask) for name, mask in kept.items()}
    shapes = {name: tuple(mask.shape) for name, mask in kept.items()}
    mask = ParamMask(bits=bits, shapes=shapes) if masked else None
    if own_step:
        engine.mask = mask
        engine.optimizer.arm(flat_masks(engine.shards, mask))
    else:
        engine.arm(mask)
    norms = []
    for step in range(1, 4):
        batch = tiny.batch(step, MICRO * ACCUMULATION * WORLD_SIZE)
        engine.backward(batch.chunk(WORLD_SIZE)[dist.rank()])
        if own_step and mask is not None:
            for f, gradient in zip(engine.shards.fragments, engine.shards.gradients(), strict=True):
                gradient.masked_fill_(~mask.fragment(f.name, f.start, f.numel), 0.0)
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-3 * step
        engine._engine.step()
        norms.append(float(engine._engine.get_global_grad_norm()))
    found = dict(engine.parameters()) | engine.local_state()() | {"norms": torch.tensor(norms)}
    engine.close()
    return found


@pytest.mark.parametrize(
    ("stage", "precision", "masked"),
    daily(
        itertools.product((1, 2, 3), ("fp32", "bf16"), (False, True)),
        [(1, "bf16", True), (2, "fp32", False), (3, "bf16", True), (3, "fp32", False)],
    ),
)
def test_step_is_deepspeeds(ranks2, stage, precision, masked):
    """To the bit: clipping and accumulation included."""
    ours = ranks2.run(three_updates, stage, precision, masked, False)
    theirs = ranks2.run(three_updates, stage, precision, masked, True)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert bool((one["norms"] > 0.01).all())
        for name in one:
            assert torch.equal(one[name], other[name]), name
