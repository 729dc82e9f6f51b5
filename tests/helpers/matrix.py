"""Every supported way to run the masked optimizer under DeepSpeed, as test cases and as a table.

python -m tests.helpers.matrix      rewrites its part of docs/SUPPORT.md
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmp_ds.optim.kernels.batch import Master

SUPPORT = Path(__file__).resolve().parents[2] / "docs" / "SUPPORT.md"
ARCHITECTURES = "\n## Architectures\n"
"""Heading of the part that tests/helpers/families.py writes."""
Model = str  # a name in test_matrix.MODELS


@dataclass(frozen=True, kw_only=True)
class Case:
    """Describe one engine: 2 ranks unless ``world_size`` says otherwise."""

    stage: int
    precision: str
    offload: str = "none"  # none, optimizer, optimizer + parameters
    accumulation: int = 1
    accumulate_fp32: bool = False
    master: Master = "dense"
    moments: str = "fp32"
    option: str = "defaults"
    zero: dict[str, Any] = field(default_factory=dict)
    model: Model = "llama"
    world_size: int = 2
    quick: bool = False  # part of `make test`

    @property
    def id(self) -> str:
        parts = [f"zero{self.stage}", self.precision]
        parts += [f"offload-{self.offload.replace(' + ', '-')}"] * (self.offload != "none")
        parts += [f"acc{self.accumulation}"] * (self.accumulation > 1)
        parts += ["fp32acc"] * self.accumulate_fp32
        parts += [self.master] * (self.master != "dense")
        parts += [f"{self.moments}-moments"] * (self.moments != "fp32")
        parts += [self.option.replace(" ", "-")] * (self.option != "defaults")
        parts += [self.model] * (self.model != "llama")
        parts += [f"{self.world_size}ranks"] * (self.world_size != 2)
        return "-".join(parts)


PRECISIONS: tuple[str, ...] = ("fp32", "bf16", "fp16")
DAILY = {
    (1, "fp32", "none"),
    (2, "fp16", "none"),
    (2, "bf16", "optimizer"),
    (3, "fp32", "none"),
    (3, "bf16", "optimizer + parameters"),
}
FEWER_BITS: tuple[tuple[str, Master, str], ...] = (
    ("bf16", "compact", "fp32"),
    ("fp16", "compact", "fp32"),
    ("bf16", "split", "fp32"),
    ("bf16", "split", "bf16"),
    ("bf16", "dense", "int8"),
    ("fp16", "compact", "bf16"),
)
DAILY_BITS = {
    (1, "optimizer", "split", "bf16"),
    (3, "none", "dense", "int8"),
}
OPTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "no reduce_scatter": ((1, 2, 3), {"reduce_scatter": False}),
    "bucket reduce to each rank": ((1, 2), {"use_multi_rank_bucket_allreduce": False}),
    "communication overlaps": ((1, 2), {"overlap_comm": True}),
    "gradients not contiguous": ((1, 2, 3), {"contiguous_gradients": False}),
    "sub-groups of 700 elements": ((3,), {"sub_group_size": 700}),
    "all parameters persistent": ((3,), {"stage3_param_persistence_threshold": 10**6}),
}


def cases() -> list[Case]:
    """Yield all cases, without repetition."""
    return list(_cases())


def _cases() -> Iterator[Case]:
    for precision in PRECISIONS[:2]:
        yield Case(stage=0, precision=precision, quick=precision == "bf16")
        yield Case(stage=0, precision=precision, accumulation=2)
        yield Case(stage=0, precision=precision, world_size=1)
    for stage in (1, 2, 3):
        offloads = ["none", "optimizer"] + ["optimizer + parameters"] * (stage == 3)
        for precision in PRECISIONS:
            for offload in offloads:
                quick = (stage, precision, offload) in DAILY
                yield Case(stage=stage, precision=precision, offload=offload, quick=quick)
                yield Case(stage=stage, precision=precision, offload=offload, accumulation=2)
        for precision, master, moments in FEWER_BITS:
            for offload in offloads:
                quick = (stage, offload, master, moments) in DAILY_BITS
                quick = quick and precision == "bf16"
                yield Case(
                    stage=stage,
                    precision=precision,
                    offload=offload,
                    master=master,
                    moments=moments,
                    quick=quick,
                )
            yield Case(
                stage=stage, precision=precision, accumulation=2, master=master, moments=moments
            )
        for precision in PRECISIONS[1:]:
            if (stage, precision) != (1, "bf16"):
                yield Case(
                    stage=stage,
                    precision=precision,
                    accumulation=2,
                    accumulate_fp32=True,
                    quick=(stage, precision) == (2, "bf16"),
                )
        for option, (stages, zero) in OPTIONS.items():
            if stage in stages:
                for precision in PRECISIONS[:2]:
                    yield Case(
                        stage=stage,
                        precision=precision,
                        option=option,
                        zero=zero,
                        quick=precision == "fp32" and "sub-groups" in option,
                    )
        for model in ("gpt2 tied", "frozen parameters"):
            for precision in PRECISIONS[:2]:
                yield Case(
                    stage=stage,
                    precision=precision,
                    model=model,
                    quick=(stage, precision) == (3, "bf16"),
                )
        yield Case(stage=stage, precision="bf16", world_size=1)
        yield Case(stage=stage, precision="bf16", world_size=4)
    for model in ("gpt2 tied", "frozen parameters"):
        yield Case(stage=0, precision="bf16", model=model)


def table() -> str:
    """Return the supported combinations in Markdown: one row per kind, derived from the cases."""
    lines = [
        "# What is supported",
        "",
        "Generated from the test matrix by `python -m tests.helpers.matrix`. Each entry is at",
        "least one case of `tests/distributed/test_matrix.py`, on 2 ranks unless stated",
        "otherwise. On real DeepSpeed engines it checks that the complement keeps its bits in the",
        "weights and in the fp32 master, that losses follow a plain PyTorch reference, that",
        "DeepSpeed reports the masked norm, and how many bytes the states take. Settings known",
        "not to work are refused by name before training starts",
        "(`pmp_ds/engine/deepspeed_config.py`).",
        "",
        "Sizes need not be divisible by the number of ranks, and a tensor may have fewer elements",
        "than there are ranks. `tests/distributed/test_odd_shapes.py` finds the same ticket with 1",
        "to 16 ranks and resumes with other ranks and stages, in models with and without experts.",
        "Experts whose widths are not multiples of 8 are computed one after the other, because",
        "torch's grouped matrix product refuses them; multiples of 8 are faster.",
        "",
        "| | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 |",
        "|---|---|---|---|---|",
    ]
    rows: dict[str, dict[int, list[str]]] = {}
    for case in cases():
        precisions = rows.setdefault(_kind(case), {}).setdefault(case.stage, [])
        if case.precision not in precisions:
            precisions.append(case.precision)
    for kind, stages in rows.items():
        cells = [", ".join(stages.get(stage, [])) or "-" for stage in range(4)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _kind(case: Case) -> str:
    parts = []
    if case.offload != "none":
        parts.append(f"CPU offload of {case.offload}")
    if case.accumulation > 1:
        where = "fp32" if case.accumulate_fp32 else "the training precision"
        parts.append(f"gradients accumulated in {where}")
    if case.master != "dense":
        parts.append(f"{case.master} fp32 master")
    if case.moments != "fp32":
        parts.append(f"{case.moments} moments")
    if case.option != "defaults":
        parts.append(case.option)
    if case.model != "llama":
        parts.append({"gpt2 tied": "tied embeddings (GPT-2)"}.get(case.model, case.model))
    if case.world_size != 2:
        parts.append(f"{case.world_size} rank{'s' * (case.world_size > 1)}")
    return ", ".join(parts) or "plain"


def write(rest: str | None = None) -> None:
    """Write docs/SUPPORT.md: the table, and ``rest`` (None: the existing text after the table)."""
    if rest is None:
        rest = ARCHITECTURES + SUPPORT.read_text().partition(ARCHITECTURES)[2]
    SUPPORT.write_text(table() + rest)


if __name__ == "__main__":
    write()
