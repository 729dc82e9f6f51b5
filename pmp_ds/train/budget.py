"""The model states of a run, per rank and by category, from shapes and settings alone.

    Budget(shapes, kept, config, ds_config, world).states()

plan.py prints these at every start; phases.py adds what each phase of a run takes besides, and
dry_run.py prints that. Partitions and their padding are those of DeepSpeed 0.19.8. The ticket's
elements count as spread evenly over the ranks.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pmp_ds.config import Config
from pmp_ds.config.moments import FP32, moments_of
from pmp_ds.config.precision import precision_of
from pmp_ds.engine.cut import Cut
from pmp_ds.engine.deepspeed_config import master_of
from pmp_ds.optim.rules import rule_of
from pmp_ds.ticket.scores import find_score

Bytes = dict[str, int]
"""By category."""
DEFAULTS = {  # of DeepSpeed; sizes in elements
    "stage": 0,
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": True,
}


@dataclass(frozen=True)
class Budget:
    """What decides about memory."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of the trained parameters, in order."""
    kept: int
    """Elements of the ticket, over all ranks."""
    config: Config
    ds_config: Mapping[str, Any]
    """The DeepSpeed JSON, as given or merged."""
    world: int
    on_cpu: bool = False
    """Whether the ranks compute on the CPU, where only those parts of a bucket take memory that
    hold something."""

    @cached_property
    def zero(self) -> dict[str, Any]:
        given = self.ds_config.get("zero_optimization", {})
        return DEFAULTS | {name: value for name, value in given.items() if value != "auto"}

    @property
    def stage(self) -> int:
        return int(self.zero["stage"])

    @property
    def element(self) -> int:
        """The bytes of a weight of the model."""
        return precision_of(self.config.train).num_bytes

    @property
    def gradient(self) -> int:
        """The bytes of an accumulated gradient."""
        return 4 if self.config.train.accumulate_fp32 else self.element

    @property
    def masked(self) -> bool:
        return self.config.mask.source != "none"

    @property
    def cut(self) -> Cut:
        return Cut.of(self.config.train, self.world)

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def num_params(self) -> int:
        return sum(self.sizes.values())

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.sizes.values())

    @cached_property
    def grouped(self) -> list[list[int]]:
        """The sizes of the parameters of each group of the optimizer, matrices and vectors."""
        found: dict[bool, list[int]] = {True: [], False: []}
        for name, shape in self.shapes.items():
            found[len(shape) >= 2].append(self.sizes[name])
        return [sizes for sizes in found.values() if sizes]

    @cached_property
    def groups(self) -> list[int]:
        """The elements of each group, padded for stages 1 and 2."""
        align = 2 * self.world
        return [-(-sum(sizes) // align) * align for sizes in self.grouped]

    @cached_property
    def local(self) -> int:
        """Elements that the optimizer of one rank holds, padding included."""
        if self.stage == 0:
            return self.num_params
        if self.stage < 3:
            return sum(self.groups) // self.world
        return sum(-(-numel // self.world) for numel in self.sizes.values())

    @property
    def sub_groups(self) -> int:
        """The flat tensors of a rank at stage 3."""
        size, count = int(self.zero["sub_group_size"]), 0
        for sizes in self.grouped:
            filled = 0
            for numel in sizes:
                filled += -(-numel // self.world)
                if filled >= size:
                    count, filled = count + 1, 0
            count += filled > 0
        return count

    @property
    def num_fragments(self) -> int:
        """The runs of elements of a parameter that a rank owns, over all ranks."""
        if self.stage == 3:
            return sum(-(-n // -(-n // self.world)) for n in self.sizes.values())
        return sum(last - first + 1 for _, first, last in self._owners())

    def offloads(self, what: str) -> bool:
        """Whether the JSON moves the `optimizer` or the `param` to host memory."""
        return (self.zero.get(f"offload_{what}") or {}).get("device") == "cpu"

    def states(self, *, dense: bool = False) -> Bytes:
        """Return the model states of one rank, wherever they are; ``dense``: of discovery, which
        trains everything."""
        train, local = self.config.train, self.local
        ticket = self.masked and not dense
        kept = -(-self.kept * local // self.num_params) if ticket else local
        weights = {0: self.num_params, 3: local}.get(self.stage, sum(self.groups))
        master = {"dense": 4 * local, "compact": 4 * kept, "split": 2 * kept}
        # Without ZeRO, fp32 weights are their own master; its stages copy them.
        in_weights = not precision_of(train).has_master and self.stage == 0
        moments = len(rule_of(train).moments) * moments_of(train).num_bytes(kept, local)
        return {
            "weights": self.element * weights,
            "gradients": self._gradients(),
            "master weights": 0 if in_weights else master[master_of(dict(self.ds_config))],
            "moments": moments,
            "mask": -(-local // 8) if ticket else 0,
        }

    def _gradients(self) -> int:
        if self.stage < 2:
            return self.gradient * self.num_params
        if self.stage == 3 or self.gradient != self.element:
            return self.gradient * self.local
        # Stage 2 keeps whole those gradients that reach into a rank's partition.
        return self.element * max(self._reaching())

    def _owners(self) -> Iterator[tuple[int, int, int]]:
        """Yield the elements of each parameter, and the first and last rank that own some of them
        at stages 1 and 2."""
        for sizes, padded in zip(self.grouped, self.groups, strict=True):
            partition, start = padded // self.world, 0
            for numel in sizes:
                yield numel, start // partition, (start + numel - 1) // partition
                start += numel

    def _reaching(self) -> Iterator[int]:
        """Yield for each rank the elements of the parameters that reach into its partition."""
        ranks = [0] * (self.world + 1)
        for numel, first, last in self._owners():  # differences, summed below
            ranks[first] += numel
            ranks[last + 1] -= numel
        total = 0
        for change in ranks[:-1]:
            total += change
            yield total

    def placed(self, states: Bytes) -> tuple[Bytes, Bytes]:
        """Return the states on the device and those in host memory."""
        device, host = dict(states), {}
        if self.offloads("optimizer"):
            moved = ("master weights", "moments", "mask")
            host = {name: device.pop(name) for name in moved}
            device |= dict.fromkeys(moved, 0)
            # In host memory also the fp32 gradients, and at stages 1 and 2 the updated weights.
            host["gradients"] = (4 + self.gradient) * self.local
            host["weights"] = self.element * self.local * (self.stage < 3)
            device["gradients"] = 0
        if self.offloads("param"):
            host["weights"] = host.get("weights", 0) + device["weights"]
            device["weights"] = 0
        return device, host

    @property
    def persistent(self) -> int:
        """Elements of the parameters that stage 3 keeps gathered."""
        limit = int(self.zero["stage3_param_persistence_threshold"])
        return sum(numel for numel in self.sizes.values() if numel <= limit)

    def checkpoint(self, buffers: int, *, dense: bool = False) -> int:
        """Return the bytes of a checkpoint, over all ranks; ``buffers``: bytes of the model's
        constants; ``dense``: of discovery."""
        return self.element * self.num_params + buffers + self.state_bytes(dense=dense)

    def release(self, buffers: int) -> int:
        """Return the bytes of a release in bf16."""
        return 2 * self.num_params + buffers

    def state_bytes(self, *, dense: bool = False) -> int:
        """Return the bytes of the optimizer state in a checkpoint, over all ranks; ``dense``: of
        discovery, with scores and two candidates."""
        train = self.config.train
        kept = self.num_params if dense or not self.masked else self.kept
        moment = 4 if moments_of(train) is FP32 else 2  # 8-bit ones are written in bf16
        master = 2 if master_of(dict(self.ds_config)) == "split" else 4
        each = len(rule_of(train).moments) * moment + precision_of(train).has_master * master
        stored = find_score(self.config.mask.score).add is not None
        extra = 4 * stored * self.num_params + 2 * -(-self.num_params // 8)
        return kept * each + (extra if dense else 0)
