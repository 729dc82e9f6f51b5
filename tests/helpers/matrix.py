"""Every supported way to run the masked optimizer under DeepSpeed, as test cases and as a table.

    python -m tests.helpers.matrix > docs/SUPPORT.md
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pmp_ds.config import Precision

Model = str  # a name in test_matrix.MODELS


@dataclass(frozen=True, kw_only=True)
class Case:
    """One engine: 2 ranks unless ``world_size`` says otherwise."""

    stage: int
    precision: Precision
    offload: str = "none"  # none, optimizer, optimizer + parameters
    accumulation: int = 1
    accumulate_fp32: bool = False
    compact_master: bool = False
    option: str = "defaults"
    zero: dict[str, Any] = field(default_factory=dict)
    model: Model = "llama"
    world_size: int = 2
    quick: bool = False  # part of the default test run

    @property
    def id(self) -> str:
        parts = [f"zero{self.stage}", self.precision]
        parts += [f"offload-{self.offload.replace(' + ', '-')}"] * (self.offload != "none")
        parts += [f"acc{self.accumulation}"] * (self.accumulation > 1)
        parts += ["fp32acc"] * self.accumulate_fp32
        parts += ["compact"] * self.compact_master
        parts += [self.option.replace(" ", "-")] * (self.option != "defaults")
        parts += [self.model] * (self.model != "llama")
        parts += [f"{self.world_size}ranks"] * (self.world_size != 2)
        return "-".join(parts)


PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
OPTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "no reduce_scatter": ((1, 2, 3), {"reduce_scatter": False}),
    "bucket reduce to each rank": ((1, 2), {"use_multi_rank_bucket_allreduce": False}),
    "gradients not contiguous": ((1, 2, 3), {"contiguous_gradients": False}),
    "sub-groups of 700 elements": ((3,), {"sub_group_size": 700}),
    "all parameters persistent": ((3,), {"stage3_param_persistence_threshold": 10**6}),
}


def cases() -> list[Case]:
    """All of them, without repetition."""
    return list(_cases())


def _cases() -> Iterator[Case]:
    for precision in PRECISIONS[:2]:
        yield Case(stage=0, precision=precision, quick=True)
        yield Case(stage=0, precision=precision, accumulation=2)
        yield Case(stage=0, precision=precision, world_size=1)
    for stage in (1, 2, 3):
        offloads = ["none", "optimizer"] + ["optimizer + parameters"] * (stage == 3)
        for precision in PRECISIONS:
            for offload in offloads:
                quick = (precision, offload) in (("fp32", "none"), ("bf16", "optimizer"))
                quick = quick or (precision == "fp16" and offload == "none")
                yield Case(stage=stage, precision=precision, offload=offload, quick=quick)
                yield Case(stage=stage, precision=precision, offload=offload, accumulation=2)
        for precision in PRECISIONS[1:]:
            if (stage, precision) != (1, "bf16"):
                yield Case(
                    stage=stage, precision=precision, accumulation=2, accumulate_fp32=True,
                    quick=stage == 2,
                )  # fmt: skip
        for option, (stages, zero) in OPTIONS.items():
            if stage in stages:
                for precision in PRECISIONS[:2]:
                    yield Case(
                        stage=stage, precision=precision, option=option, zero=zero,
                        quick=precision == "fp32" and "sub-groups" in option,
                    )  # fmt: skip
        for model in ("gpt2 tied", "frozen parameters"):
            for precision in PRECISIONS[:2]:
                yield Case(stage=stage, precision=precision, model=model, quick=stage == 3)
        yield Case(stage=stage, precision="bf16", world_size=1)
        yield Case(stage=stage, precision="bf16", world_size=4, quick=stage == 3)
    for model in ("gpt2 tied", "frozen parameters"):
        yield Case(stage=0, precision="bf16", model=model)
