"""The memory of a run, per rank and by category, from shapes and settings alone.

    budget = Budget(shapes, kept, config, ds_config, world)
    budget.states()                         bytes between two updates, and of the gradients
    budget.training(timeline)               the peak of an update, on the device

plan.py prints the first at every start, dry_run.py everything. Partitions and their padding are
those of DeepSpeed 0.19.8. The ticket's elements count as spread evenly over the ranks.
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
from pmp_ds.optim.stored import CHUNK
from pmp_ds.state.weight_files import Layout
from pmp_ds.ticket.scores import find_score
from pmp_ds.train.activations import Timeline

Bytes = dict[str, int]
"""By category."""
_DEFAULTS = {  # of DeepSpeed; sizes in elements
    "stage": 0,
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": True,
}
_STAGE0_BUCKET = 500_000_000  # elements
_CHUNK = 1 << 22  # elements of theta(0) drawn at once
_SPLIT = 24  # bytes per element of a chunk while master weights are split
_DRAW = 24  # bytes per element while they are drawn: bits, uniforms, results


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
        return _DEFAULTS | {name: value for name, value in given.items() if value != "auto"}

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
            # In host memory also the fp32 gradients, and the weights on their way back.
            host["gradients"] = (4 + self.gradient) * self.local
            host["weights"] = self.element * self.local
            device["gradients"] = 0
        if self.offloads("param"):
            host["weights"] = host.get("weights", 0) + device["weights"]
            device["weights"] = 0
        return device, host

    def _buckets(self) -> int:
        """Return the bytes of DeepSpeed's communication buffers, and copies of them."""
        size = min(
            int(self.zero["reduce_bucket_size"]), self.num_params if self.on_cpu else 1 << 62
        )
        if self.stage == 0:
            return self.element * min(self.num_params, _STAGE0_BUCKET + self.largest)
        number = 1 + (self.stage < 3 and bool(self.zero.get("overlap_comm"))) + (self.world > 1)
        offloaded = self.element * self.largest if self.offloads("optimizer") else 0
        return number * self.element * size + offloaded

    @property
    def persistent(self) -> int:
        """Elements of the parameters that stage 3 keeps gathered."""
        limit = int(self.zero["stage3_param_persistence_threshold"])
        return sum(numel for numel in self.sizes.values() if numel <= limit)

    def gathered(self) -> int:
        """Return the bytes of gathered parameters at stage 3, at most."""
        if self.stage < 3:
            return 0
        # What the backward pass needs again so soon stays from the forward pass.
        near = int(self.zero["stage3_max_reuse_distance"]) // 2
        ahead = int(self.zero["stage3_prefetch_bucket_size"]) + self.largest
        return self.element * min(self.num_params, self.persistent + near + ahead)

    def update(self, timeline: Timeline | None, sequences: int, *, dense: bool = False) -> Bytes:
        """Return the peak of an update on the device with so many sequences per micro-batch, by
        category; ``dense``: of an update of discovery. Without a timeline no activations count."""
        found, _ = self.placed(self.states(dense=dense))
        full, buckets = found["gradients"], self._buckets()
        static = self.stage == 3 or self.cut.accumulation_steps > 1
        each = 0.0 if static else full / self.num_params
        peak = timeline.peak(sequences, each) if timeline else 0
        activations = max(peak - (0 if static else full), 0)
        if self.stage < 2:  # they are filled when the backward pass is over
            buckets = max(buckets - activations, 0)
        found |= {"gathered parameters": self.gathered(), "communication buckets": buckets}
        if dense and not self.offloads("optimizer"):
            found["scores and candidates"] = self._scores()
        return found | {"activations, logits": activations}

    def _scores(self) -> int:
        stored = find_score(self.config.mask.score).add is not None
        candidates = 3 + (self.config.mask.random_fraction > 0)  # newest, last, best; drawn
        return self.local * 4 * stored + candidates * -(-self.local // 8)

    def start(self, *, resumed: bool = False) -> Bytes:
        """Return the peak on the device while the engine is built, or its state restored."""
        states = self.states()
        found, host = self.placed(states)
        found["gradients"] = found["gradients"] if self.stage == 3 else 0
        ready = sum(found.values())
        wrapped = self.stage > 0 or precision_of(self.config.train).has_master
        piece = min(self.local, int(self.zero["sub_group_size"])) if self.stage == 3 else self.local
        if resumed:
            extra = 5 * min(piece, self.largest)
        else:
            # DeepSpeed copies the weights to one tensor; then it makes fp32 masters, and gradients
            # of 0. A compact or split master takes the place of a dense one.
            peaks = [ready, found["weights"] * (2 if 0 < self.stage < 3 else 1)]
            if wrapped and not host:
                peaks.append(found["weights"] + found["gradients"] + 4 * self.local + 4 * piece)
            if not host and (found["master weights"] not in (0, 4 * self.local)):
                kept = piece * self.kept // self.num_params
                splitting = master_of(dict(self.ds_config)) == "split"
                chunk = _SPLIT * min(kept, CHUNK) * splitting
                peaks.append(ready + 4 * self.local + 8 * kept + chunk)
            extra = max(peaks) - ready
        return found | {"while it is built": extra}

    def host(self, phase: str, *, drawn_whole: bool = False) -> Bytes:
        """Return the bytes in host memory in a phase of the run."""
        dense = phase == "discovery"
        _, found = self.placed(self.states(dense=dense))
        if self.masked and not dense:
            found["mask, whole"] = -(-self.num_params // 8)
        if dense and self.offloads("optimizer"):
            found["scores and candidates"] = self._scores()
        if phase in ("start", "resume"):
            size = 4 * self.num_params if drawn_whole else _DRAW * min(_CHUNK, self.largest)
            found["theta(0), drawn" if phase == "start" else "checkpoint, read"] = size
            found["mask of the partition, unpacked"] = self.local if self.masked else 0
        if phase == "save":
            found |= self._staged()
        return found

    def _staged(self) -> Bytes:
        """Return the copies that a save makes on the rank with the largest share."""
        layout = Layout.of({n: s * self.element for n, s in self.sizes.items()}, self.world)
        shares = [
            sum(self.sizes[n] for names in layout.files[rank :: self.world] for n in names)
            for rank in range(min(self.world, len(layout.files)))
        ]
        states, has_master = self.states(), precision_of(self.config.train).has_master
        copied = states["moments"] + (states["master weights"] if has_master else 0)
        written = self.state_bytes() // (1 if self.stage == 0 else self.world)
        return {"staged weights": self.element * max(shares), "staged state": copied + written}

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
