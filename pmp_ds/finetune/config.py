"""Settings of pmp-ds finetune; every field's docstring is its line in ``--help``."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pmp_ds.config import (
    Config,
    GuardConfig,
    RunConfig,
    TrainConfig,
    check_store,
)
from pmp_ds.config.moments import MOMENTS
from pmp_ds.config.precision import PRECISIONS
from pmp_ds.config.rules import RULES
from pmp_ds.config.schedules import SCHEDULES
from pmp_ds.config.train import known_name
from pmp_ds.errors import require, require_known
from pmp_ds.finetune.method import METHODS


@dataclass(frozen=True, kw_only=True)
class TuneDataConfig:
    """What is learned from."""

    glue_dir: str | None = None
    """Folder of GLUE tasks, `TASK/train.jsonl[.gz]` and `TASK/validation*.jsonl[.gz]`; unset
    downloads them from the Hugging Face hub."""

    max_train: int | None = None
    """Training examples drawn from a task's, the same ones for every seed; unset means all."""

    max_length: int = 128
    """Longest example in tokens; the longer text of a pair is cut first."""

    store: dict[str, float] | str | None = None
    """For `task: lm`: packed text, a folder of pmp-ds prepare-data made with the model's own
    tokenizer, or a mixture."""

    def __post_init__(self) -> None:
        require(self.max_length >= 4, f"data.max_length={self.max_length} must be at least 4")
        require(
            self.max_train is None or self.max_train >= 1,
            f"data.max_train={self.max_train} must be at least 1",
        )
        if self.store is not None:
            check_store(self.store)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """For `method: lora`: low-rank adapters beside frozen weights, by `peft`."""

    rank: int = 8
    """Rank of every adapter."""

    alpha: float = 16.0
    """Adapters are multiplied by alpha / rank."""

    dropout: float = 0.0
    """Dropout before every adapter."""

    targets: tuple[str, ...] = ("all-linear",)
    """Names of the modules that get one, such as q_proj v_proj; `all-linear` means every linear
    module of the blocks."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora.rank={self.rank} must be at least 1")
        require(self.alpha > 0, f"lora.alpha={self.alpha} must be positive")
        require(0 <= self.dropout < 1, f"lora.dropout={self.dropout} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TuneTrainConfig:
    """The optimization: AdamW with linear warm-up and a cosine to zero, unless told otherwise."""

    optimizer: str = known_name("adamw", RULES)
    """The rule that updates what is trained: `adamw`, `lion` or `sgd` with momentum."""

    moments: str = known_name("fp32", MOMENTS)
    """Format of the optimizer's moments, as in pretraining: `fp32`, `bf16` or `int8`."""

    lr: float = 5e-5
    """Peak learning rate."""

    epochs: float = 3.0
    """Passes over the training examples."""

    steps: int | None = None
    """Updates, instead of `epochs`."""

    global_batch_size: int = 32
    """Examples per update, over all ranks and accumulation steps; any number of ranks up to this
    shares them out."""

    micro_batch_size: int | None = None
    """Most examples per forward pass on one rank; unset means a rank's whole share, up to 32. May
    change between restarts of a run."""

    schedule: str = known_name("cosine", SCHEDULES)
    """Learning rate after the warm-up: a `cosine` or a `linear` fall to zero, `constant`, or `wsd`:
    constant until a linear fall over the last `train.decay_ratio` of the updates."""

    warmup_ratio: float = 0.06
    """Share of the updates that warm up."""

    decay_ratio: float = 0.2
    """For `schedule: wsd`: share of the updates that fall."""

    weight_decay: float = 0.01
    """Decoupled weight decay, on trained elements of matrices only."""

    clip_norm: float = 1.0
    """Largest gradient norm of what is trained; 0 switches clipping off."""

    precision: str = known_name("fp32", PRECISIONS)
    """Precision of the weights in forward and backward; master weights stay fp32."""

    def __post_init__(self) -> None:
        require_known("train.schedule", self.schedule, SCHEDULES, "schedules")
        require(
            0.0 < self.epochs < math.inf, f"train.epochs={self.epochs} must be positive and finite"
        )
        require(
            0.0 <= self.warmup_ratio <= 1.0,
            f"train.warmup_ratio={self.warmup_ratio} must be in [0, 1]",
        )
        require(
            0.0 <= self.decay_ratio <= 1.0,
            f"train.decay_ratio={self.decay_ratio} must be in [0, 1]",
        )
        require(
            not self._stable or self.decay_ratio <= 1.0 - self.warmup_ratio,
            f"train.decay_ratio={self.decay_ratio} must be between 0 and 1 - train.warmup_ratio = "
            f"{1.0 - self.warmup_ratio:g}",
        )
        self.complete(self.global_batch_size, 1)

    @property
    def _stable(self) -> bool:
        """Whether the rate falls only over ``decay_ratio`` of the updates."""
        return SCHEDULES[self.schedule].stable

    def facts(self) -> dict[str, Any]:
        """Return what results record of it: all but how it fits on the machine, and nothing where
        it is what it was before it became a setting."""
        values = asdict(self)
        del values["micro_batch_size"]
        if not self._stable:
            del values["decay_ratio"]
        defaults = {"steps": None, "optimizer": "adamw", "schedule": "cosine", "moments": "fp32"}
        return {k: v for k, v in values.items() if k not in defaults or v != defaults[k]}

    def complete(self, num_samples: int, world_size: int) -> TrainConfig:
        """The settings of the loop for ``num_samples`` training examples on so many ranks."""
        steps, micro_batch_size = self.steps, self.micro_batch_size
        if micro_batch_size is None:
            micro_batch_size = min(32, -(-self.global_batch_size // world_size))
        if steps is None:
            steps = max(1, math.ceil(self.epochs * num_samples / self.global_batch_size))
        warmup_steps, decay_steps = round(self.warmup_ratio * steps), None
        if self._stable:
            decay_steps = min(round(self.decay_ratio * steps), steps - warmup_steps)
        return TrainConfig(
            optimizer=self.optimizer,
            moments=self.moments,
            schedule=self.schedule,
            decay_steps=decay_steps,
            steps=steps,
            global_batch_size=self.global_batch_size,
            micro_batch_size=micro_batch_size,
            precision=self.precision,
            compile="none",  # the examples of a task have many lengths
            lr=self.lr,
            warmup_steps=warmup_steps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A released model, a task, and what may change."""

    model: str = ""
    """Folder of the released model."""

    task: str = ""
    """A GLUE task (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte), or `lm`: next-token prediction on
    `data.store`."""

    method: str = known_name("full", METHODS)
    """`full`: every weight. `lora`: low-rank adapters. `ticket`: the elements of the ticket
    (authorized). Controls: `random`, a random mask of equal density; `complement`, everything but
    the ticket. A classification head is new: outside every mask, it always trains."""

    ticket: str | None = None
    """For `ticket` and `complement`: a ticket's folder, or a sealed file."""

    identity: str | None = None
    """Secret key that opens a sealed ticket, of `age` or ssh."""

    passphrase_file: str | None = None
    """File whose first line opens a sealed ticket."""

    mask_name: str = "own"
    """What results call the ticket; name it otherwise when it is not the model's own, as one that
    an attacker recovered."""

    density: float = 0.7
    """For `random`: the share of the weights that is trained."""

    scratch: bool = False
    """Start from fresh random weights of the same architecture instead: the control that shows what
    pretraining was worth."""

    seed: int = 0
    """Seed of new heads and adapters, random masks, fresh weights and the order of the examples."""

    arm: str | None = None
    """What results call the model; unset means the name of its run or folder."""

    results: str | None = None
    """File to append the result to; unset means results.jsonl in the run's folder."""

    data: TuneDataConfig = field(default_factory=TuneDataConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TuneTrainConfig = field(default_factory=TuneTrainConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(name="finetune", async_save=False))
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        require(self.model != "", "--model is missing: name the folder of a released model")
        require(self.task != "", "--task is missing: name a GLUE task such as sst2, or lm for text")
        require_known("--method", self.method, METHODS, "methods")
        method = METHODS[self.method]
        require(
            self.ticket is not None or not method.needs_ticket,
            f"--method {self.method} needs --ticket: the ticket's folder, or a sealed file",
        )
        require(0.0 < self.density <= 1.0, f"density={self.density} must be in (0, 1]")
        require(0 <= self.seed < 2**31, f"seed={self.seed} must be between 0 and 2^31 - 1")
        require(
            (self.task == "lm") == (self.data.store is not None),
            f"data.store={self.data.store!r} does not go with task={self.task!r}: `lm` needs a "
            "store, and nothing else reads one",
        )
        require(
            not self.scratch or method.from_scratch,
            f"--scratch true does not go with --method {self.method}: fresh weights have no ticket "
            "and nothing worth adapting",
        )

    def loop_config(self, num_samples: int, world_size: int) -> Config:
        """What the training loop, the saver and the guard read."""
        train = self.train.complete(num_samples, world_size)
        return Config(run=self.run, guard=self.guard, train=train)
