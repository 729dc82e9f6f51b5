"""What a study consists of, as a YAML file; every field's docstring says what it does."""

from dataclasses import dataclass, field

from pmp_ds.errors import UserError, require
from pmp_ds.study.runs import BASE, PMP

Scalar = str | int | float | bool
Flags = dict[str, Scalar | list[Scalar]]
"""Flags of a launcher, without `--`; a list becomes several words."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model to pretrain and export."""

    configs: list[str] = field(default_factory=list)
    """Recipes and overlays of `pretrain`, in order."""

    settings: Flags = field(default_factory=dict)
    """Further flags of `pretrain`."""

    seed_of: str | None = None
    """The arm of which this is one more pretraining seed (give it another `data.seed`): results
    and report count it as that arm."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A sweep of `finetune` for each of `arms` and `tasks`."""

    arms: list[str]
    """Names of arms."""

    tasks: list[str]
    """GLUE tasks, or `lm`."""

    methods: list[str]
    """full, lora, ticket, random, complement."""

    sweep: dict[str, list[Scalar]]
    """Settings and their values; every combination is run. The same for all arms and methods, so
    that none has more tries."""

    settings: Flags = field(default_factory=dict)
    """Further flags of `finetune`."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measurements of `evaluate`."""

    arms: list[str]
    """Names of arms."""

    measures: list[str]
    """perplexity, last_word, glue, lm_eval, landscape, gradients."""

    settings: Flags = field(default_factory=dict)
    """Further flags of `evaluate`."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Attacks of `audit` on some arms."""

    arms: list[str] = field(default_factory=list)
    """Names of arms."""

    settings: Flags = field(default_factory=dict)
    """Further flags of `audit`."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms, what is done to them, and where it goes."""

    root: str = "study"
    """Folder of the study: runs/, results.jsonl, report/. `{root}` stands for it in settings, as in
    `ticket: "{root}/runs/other/private/ticket"`."""

    stores: dict[str, Flags] = field(default_factory=dict)
    """Stores to prepare, each with flags of `prepare-data`."""

    arms: dict[str, Arm] = field(default_factory=dict)
    """By name. `base` (no mask), `pmp` and `random` (a random mask) have a role in the report."""

    tunings: list[Tuning] = field(default_factory=list)
    """Fine-tunings, in order."""

    evaluations: list[Evaluation] = field(default_factory=list)
    """Measurements, in order."""

    audit: Audit = field(default_factory=Audit)
    """Attacks on the releases."""

    def __post_init__(self) -> None:
        for name in (BASE, PMP):
            require(name in self.arms, f"arms has no `{name}`: the study compares it")
        for name, arm in self.arms.items():
            first = arm.seed_of
            if first is not None and (first not in self.arms or self.arms[first].seed_of):
                raise UserError(
                    f"arms: {name} has seed_of={first}: name an arm that is not itself a seed of "
                    "another"
                )
        parts = [("tunings", t.arms) for t in self.tunings]
        parts += [("evaluations", e.arms) for e in self.evaluations] + [("audit", self.audit.arms)]
        for where, names in parts:
            for name in names:
                if name not in self.arms:
                    raise UserError(f"{where}: arms has no `{name}`; it has {', '.join(self.arms)}")
        for tuning in self.tunings:
            require("seed" in tuning.sweep, "tunings: the sweep has no seed; give several")
            require(all(tuning.sweep.values()), "tunings: a setting of the sweep has no value")
