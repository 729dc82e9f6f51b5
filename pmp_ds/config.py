"""The configuration tree: what is learned. How it fits on the machine is in ds_configs/*.json.

Every field's docstring becomes its line in ``--help``. Checks here need no file, network or
process group; what needs them is checked where it is opened.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from pmp_ds.errors import UserError, require

Precision = Literal["fp32", "bf16", "fp16"]
Optimizer = Literal["adamw", "lion", "sgd"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]

_BETAS: dict[Optimizer, tuple[float, float]] = {
    "adamw": (0.9, 0.999), "lion": (0.9, 0.99), "sgd": (0.9, 0.0)
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and how often it reports. May change between restarts of a run."""

    name: str = "pmp"
    """Name of the run: its folder under `run.root`."""

    root: str = "runs"
    """Folder that holds the runs."""

    log_every: int = 1
    """Updates between two lines of metrics.jsonl."""

    val_every: int = 100
    """Updates between two validations; the first and the last update always validate."""

    val_blocks: int = 256
    """Validation blocks read at each validation, the same ones every time."""

    checkpoint_every: int = 500
    """Updates between two checkpoints; the last update always writes one."""

    keep_last: int = 2
    """Newest checkpoints kept."""

    keep_every: int = 0
    """Keep also every checkpoint whose update is a multiple of this; 0 keeps none of them."""

    async_save: bool = True
    """Write checkpoints in the background; training waits only until their content is copied to
    CPU memory (on rank 0 that is the whole model). Without it, until the files are safe."""

    max_time: float | str | None = None
    """Time that this job may take, as HH:MM:SS or seconds: it saves and stops in time, with exit
    code 75. Unset means no limit."""

    restarts: int = 0
    """How often each rank restarts after a fault (not after a mistake in the settings or when it
    was asked to stop), from the last checkpoint."""

    def __post_init__(self) -> None:
        require(
            self.name not in ("", ".", "..") and "/" not in self.name,
            f"run.name={self.name!r} is not a folder name; set run.root for the folder above it",
        )
        for name in ("log_every", "val_every", "val_blocks", "checkpoint_every", "keep_last"):
            value = getattr(self, name)
            require(value >= 1, f"run.{name}={value} must be at least 1")
        for name in ("keep_every", "restarts"):
            value = getattr(self, name)
            require(value >= 0, f"run.{name}={value} must not be negative")
        _ = self.max_seconds

    @property
    def max_seconds(self) -> float:
        """``max_time`` in seconds, infinite when unset; raises UserError."""
        if self.max_time is None:
            return math.inf
        try:
            parts = [float(part) for part in str(self.max_time).split(":")]
            seconds = sum(part * 60.0**i for i, part in enumerate(reversed(parts)))
            if len(parts) > 3 or not 0.0 < seconds < math.inf or min(parts) < 0.0:
                raise ValueError
        except ValueError:
            raise UserError(
                f"run.max_time={self.max_time!r} is no time: write HH:MM:SS, MM:SS or seconds"
            ) from None
        return seconds


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What to do when something goes wrong. May change between restarts of a run."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop, or skip the batch, for which every update waits
    until its loss is known."""

    spike: Literal["ignore", "warn", "skip", "stop"] = "warn"
    """A loss far above its running mean: say so, skip the batch, or save and stop before it. With
    the last two, every update waits until its loss is known."""

    spike_sigmas: float = 8.0
    """How many running standard deviations above the running mean are a spike."""

    drift: Literal["ignore", "stop"] = "stop"
    """Frozen elements that changed, or a mask that changed in memory: stop without saving."""

    drift_every: int = 100
    """Updates between two looks at a sample of the frozen elements."""

    straggler: Literal["ignore", "warn", "stop"] = "warn"
    """A rank that takes much longer than the others: name it, or save and stop as well."""

    straggler_factor: float = 2.0
    """A straggler takes this many times as long as the median of the other ranks."""

    straggler_seconds: float = 0.5
    """And at least so many seconds longer for an update: what is less is noise."""

    disk: Literal["warn", "stop"] = "warn"
    """A checkpoint for which the disk has no room: go on without it, or stop. The last one always
    stops."""

    hang_seconds: float = 1800.0
    """Without progress for so long, every rank writes its stacks to `stacks/` and the run ends;
    0 waits for ever."""

    lost_seconds: float = 60.0
    """A rank that gives no sign of life for so long, because its host or network is gone, ends the
    run, which names it; 0 waits for as long as the system's network does."""

    def __post_init__(self) -> None:
        require(self.spike_sigmas > 0, f"guard.spike_sigmas={self.spike_sigmas} must be positive")
        require(self.drift_every >= 1, f"guard.drift_every={self.drift_every} must be at least 1")
        require(
            self.straggler_factor > 1,
            f"guard.straggler_factor={self.straggler_factor} must be above 1",
        )
        require(
            self.lost_seconds == 0 or self.lost_seconds >= 5,
            f"guard.lost_seconds={self.lost_seconds} must be 0 or at least 5: signs of life come "
            "every second, and a busy machine may be late",
        )
        for name in ("hang_seconds", "straggler_seconds"):
            value = getattr(self, name)
            require(value >= 0, f"guard.{name}={value} must not be negative")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The initial weights theta(0)."""

    seed: int | None = None
    """Paper mode: draw theta(0) from this public torch seed, so that anyone who knows it can find
    the mask. Leave it unset for secret weights from a random key in `private/init/`."""

    def __post_init__(self) -> None:
        require(
            self.seed is None or 0 <= self.seed < 2**63,
            f"init.seed={self.seed} must be between 0 and 2^63 - 1",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture, built with the classes of `transformers`."""

    family: Literal["llama", "gpt2", "auto"] = "llama"
    """`llama`, `gpt2`, or `auto`: any causal model from the config.json at `model.path`."""

    path: str | None = None
    """For `auto`: a folder with a config.json, or the file itself. No weights are read."""

    vocab_size: int | None = None
    """Rows of the embedding; unset means the tokenizer's own size."""

    hidden_size: int = 2048
    """Width of the residual stream."""

    num_layers: int = 22
    """Transformer blocks."""

    num_heads: int = 32
    """Attention heads."""

    num_kv_heads: int | None = None
    """Key and value heads (`llama`); unset means `num_heads`."""

    intermediate_size: int | None = None
    """Width of the feed-forward layer; unset means 4 x `hidden_size`."""

    max_positions: int = 2048
    """Longest context the released model accepts, in tokens."""

    rope_theta: float = 10000.0
    """Base of the rotary embedding (`llama`)."""

    tie_embeddings: bool = False
    """Use one matrix for the input embedding and the output head."""

    def __post_init__(self) -> None:
        require(
            (self.path is not None) == (self.family == "auto"),
            f"model.path={self.path!r} does not go with model.family={self.family!r}: a path is "
            "needed for `auto` and used for nothing else",
        )
        for name in ("hidden_size", "num_layers", "num_heads", "max_positions"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}={value} must be at least 1")
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size={self.hidden_size} is not a multiple of "
            f"model.num_heads={self.num_heads}",
        )
        require(
            self.num_heads % (self.num_kv_heads or self.num_heads) == 0,
            f"model.num_heads={self.num_heads} is not a multiple of "
            f"model.num_kv_heads={self.num_kv_heads}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The packed tokens and their order."""

    store: dict[str, float] | str = "tokenized_data/demo"
    """Folder written by pmp-ds prepare-data; or a mixture of several, each with its weight:
    {FOLDER: WEIGHT, FOLDER: WEIGHT}."""

    separate_documents: bool = False
    """Keep the documents in a block apart (`llama` and `gpt2`): positions start again after each
    end-of-text token, attention does not cross it, and no loss is taken of what follows it. Off,
    as in the paper, a block is one text."""

    seed: int = 0
    """Seed of the sample order of masked pretraining (discovery draws its own, secret order)."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"data.seed={self.seed} must be between 0 and 2^63 - 1")
        check_store(self.store)


def check_store(store: dict[str, float] | str) -> None:
    """Raise UserError unless ``data.store`` names a folder or a mixture."""
    if isinstance(store, str):
        require(
            not store.startswith(("{", "[")) and store != "",
            f"data.store={store} is neither a folder nor a mixture: write "
            "{FOLDER: WEIGHT, FOLDER: WEIGHT} with numbers for the weights, each folder once",
        )
        return
    require(len(store) > 0, "data.store={} names no folder")
    for folder, weight in store.items():
        require(
            0.0 < weight < float("inf"),
            f"data.store: the weight of {folder} is {weight}; it must be positive",
        )


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """The ticket and how it is found (paper, section 2.1)."""

    source: Literal["earlybird", "random", "none", "file"] = "earlybird"
    """`earlybird`: the paper's discovery. `random`: a uniform mask of equal density from a secret
    key. `none`: train everything (the BASE control). `file`: the ticket at `mask.file`."""

    density: float = 0.7
    """Fraction of the parameters kept and trained, in (0, 1]."""

    score: str = "mean"
    """What top-k ranks: the running `mean` of |g|, its exponential mean `ema`, or |g| of the one
    update, `gradient` (the paper's Eq. 2; its masks seldom become stable)."""

    score_decay: float = 0.95
    """Decay of the exponential mean (`score: ema`)."""

    iou_threshold: float = 0.99
    """Two consecutive masks are alike from this intersection over union on."""

    patience: int = 5
    """Consecutive alike masks that make the ticket."""

    max_steps: int = 500
    """Longest discovery, in updates (the paper's t_EB)."""

    on_unstable: Literal["error", "last", "best"] = "error"
    """When `max_steps` pass without a stable mask: stop, take the last candidate, or the one with
    the highest IoU."""

    always_train: bool = True
    """Keep every tensor that starts as a constant (norms, biases) in the ticket: a constant that
    never moved would show that it was frozen."""

    quota: Literal["global", "per_tensor"] = "global"
    """`global`: the highest scores of all parameters together (the paper). `per_tensor`: every
    tensor keeps the same share, so that its size alone tells nothing about its elements."""

    random_fraction: float = 0.0
    """Share of the ticket that is drawn uniformly with the secret key instead of by score, in
    [0, 1]: what an attacker's scores cannot recover."""

    file: str | None = None
    """For `source: file`: a ticket folder."""

    def __post_init__(self) -> None:
        require(
            0.0 < self.density <= 1.0,
            f"mask.density={self.density} must be in (0, 1]: it is the fraction that is trained",
        )
        require(
            0.0 < self.score_decay < 1.0, f"mask.score_decay={self.score_decay} must be in (0, 1)"
        )
        require(
            0.0 < self.iou_threshold <= 1.0,
            f"mask.iou_threshold={self.iou_threshold} must be in (0, 1]",
        )
        require(
            0.0 <= self.random_fraction <= 1.0,
            f"mask.random_fraction={self.random_fraction} must be in [0, 1]",
        )
        for name in ("patience", "max_steps"):
            value = getattr(self, name)
            require(value >= 1, f"mask.{name}={value} must be at least 1")
        require(
            (self.file is not None) == (self.source == "file"),
            f"mask.file={self.file!r} does not go with mask.source={self.source!r}: a file is "
            "needed for `file` and used for nothing else",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization: the paper's (appendix A), and torch's AdamW where the paper is silent."""

    optimizer: Optimizer = "adamw"
    """The rule that updates the ticket's elements: `adamw` (the paper's), `lion`, or `sgd` with
    momentum; those two have no kernel of their own and run in torch operations."""

    steps: int = 20000
    """Optimizer updates of masked pretraining."""

    global_batch_size: int = 32
    """Sequences per update, over all ranks and accumulation steps; any number of ranks up to this
    shares them out."""

    micro_batch_size: int = 32
    """Most sequences per forward pass on one rank; a rank's share is cut into as few micro-batches
    of equal size as that allows. May change between restarts of a run."""

    precision: Precision = "bf16"
    """Precision of the weights in forward and backward; the master weights stay fp32. `fp16` scales
    the loss dynamically and needs ZeRO 1, 2 or 3."""

    accumulate_fp32: bool = False
    """Add up the gradients of micro-batches in fp32 instead of `train.precision`; with `bf16` it
    needs ZeRO 2 or 3."""

    lr: float = 2e-5
    """Peak learning rate."""

    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: a `cosine` or a `linear` fall to the last update,
    `constant`, or `wsd`: constant until a linear fall over the last `train.decay_steps` updates."""

    warmup_steps: int = 2000
    """Updates of linear warm-up before the schedule."""

    decay_steps: int | None = None
    """For `schedule: wsd`: updates of the fall at the end; 0 for none yet. May change between
    restarts of a run, as may `train.steps`, where the learning rates so far stay the same."""

    min_lr_ratio: float = 0.0
    """Learning rate at the last update, as a fraction of the peak; `constant` never falls."""

    weight_decay: float = 0.01
    """Decoupled weight decay, on the ticket's elements of matrices only."""

    betas: tuple[float, float] | None = None
    """Decay of AdamW's first and second moment; Lion's two; the first is SGD's momentum. Unset
    means 0.9 0.999 for `adamw`, 0.9 0.99 for `lion`, 0.9 0 for `sgd`."""

    eps: float = 1e-8
    """AdamW's epsilon; the other rules have none."""

    clip_norm: float = 1.0
    """Largest norm of the masked gradient; 0 switches clipping off."""

    def __post_init__(self) -> None:
        if self.betas is None:  # the same settings, whether the defaults were written out or not
            object.__setattr__(self, "betas", _BETAS[self.optimizer])
        assert self.betas is not None
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name}={value} must be at least 1")
        require(self.lr > 0.0, f"train.lr={self.lr} must be positive")
        require(
            0 <= self.warmup_steps <= self.steps,
            f"train.warmup_steps={self.warmup_steps} must be between 0 and "
            f"train.steps={self.steps}",
        )
        require(
            (self.decay_steps is not None) == (self.schedule == "wsd"),
            f"train.decay_steps={self.decay_steps} does not go with train.schedule={self.schedule}:"
            " `wsd` needs it, and nothing else uses it",
        )
        require(
            0 <= (self.decay_steps or 0) <= self.steps - self.warmup_steps,
            f"train.decay_steps={self.decay_steps} must be between 0 and train.steps - "
            f"train.warmup_steps = {self.steps - self.warmup_steps}",
        )
        require(
            0.0 <= self.min_lr_ratio <= 1.0,
            f"train.min_lr_ratio={self.min_lr_ratio} must be in [0, 1]",
        )
        require(
            self.weight_decay >= 0.0, f"train.weight_decay={self.weight_decay} must not be negative"
        )
        require(
            all(0.0 <= beta < 1.0 for beta in self.betas),
            f"train.betas={self.betas} must both be in [0, 1)",
        )
        require(self.eps > 0.0, f"train.eps={self.eps} must be positive")
        require(self.clip_norm >= 0.0, f"train.clip_norm={self.clip_norm} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One pretraining run."""

    run: RunConfig = field(default_factory=RunConfig)
    init: InitConfig = field(default_factory=InitConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        require(
            not self.data.separate_documents or self.model.family != "auto",
            "data.separate_documents=true needs model.family=llama or gpt2: not every architecture "
            "of model.family=auto can keep documents apart",
        )
