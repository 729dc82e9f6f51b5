"""The optimization: `train`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pmp_ds.config.moments import MOMENTS
from pmp_ds.config.precision import PRECISIONS
from pmp_ds.config.rules import RULES
from pmp_ds.config.schedules import SCHEDULES
from pmp_ds.errors import require, require_known


def known_name(default: str, known: Mapping[str, object]) -> Any:
    """Return a field that holds a name of the registry ``known``; --help lists them all."""
    return field(default=default, metadata={"choices": known})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization: the paper's (appendix A), and torch's AdamW where the paper is silent."""

    optimizer: str = known_name("adamw", RULES)
    """The rule that updates the ticket's elements: `adamw` (the paper's), `lion`, or `sgd` with
    momentum; those two have no kernel of their own and run in torch operations."""

    steps: int = 20000
    """Optimizer updates of masked pretraining."""

    global_batch_size: int = 32
    """Sequences per update, over all ranks and accumulation steps; any number of ranks up to this
    shares them out."""

    micro_batch_size: int | Literal["auto"] = 32
    """Most sequences per forward pass on one rank; a rank's share is cut into as few micro-batches
    of equal size as that allows. `auto` takes what fits in 90% of the free memory, by two trial
    passes, and the same again when the run resumes on the same hardware. Another number changes the
    last bits of the losses, nothing else. May change between restarts of a run."""

    precision: str = known_name("bf16", PRECISIONS)
    """Precision of the weights in forward and backward; the master weights stay fp32. `fp16` scales
    the loss dynamically and needs ZeRO 1, 2 or 3."""

    moments: str = known_name("fp32", MOMENTS)
    """Format of the optimizer's moments: `fp32`; `bf16`, rounded at random, for half the memory; or
    `int8`, 8-bit floating-point numbers with an exponent for each block, for a quarter."""

    accumulate_fp32: bool = False
    """Add up the gradients of micro-batches in fp32 instead of `train.precision`; with `bf16` it
    needs ZeRO 2 or 3."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass, for less memory: `full` keeps the inputs of the
    layers alone; `selective` (ZeRO 0, 1 and 2) also the results of matrix products and attention,
    and takes less time. The losses stay the same. May change between restarts of a run."""

    compile: Literal["auto", "layers", "none"] = "auto"
    """torch.compile of each repeated `layers`: faster from the second minute on, other last bits.
    `auto` does so on a GPU at ZeRO 0, 1 and 2. May change between restarts of a run."""

    profile: str | None = None
    """Updates to write a trace of, such as 10:13, to `profile/` in the run's folder. May change
    between restarts of a run."""

    lr: float = 2e-5
    """Peak learning rate."""

    schedule: str = known_name("cosine", SCHEDULES)
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

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last update of ``profile``; raises UserError for other words."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition(":")
        valid = first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)
        require(
            valid,
            f"train.profile={self.profile!r} must be FIRST:LAST, two updates from 1 such as 10:13",
        )
        return int(first), int(last)

    def __post_init__(self) -> None:
        require_known("train.optimizer", self.optimizer, RULES, "optimizers")
        require_known("train.moments", self.moments, MOMENTS, "formats")
        require_known("train.precision", self.precision, PRECISIONS, "precisions")
        require_known("train.schedule", self.schedule, SCHEDULES, "schedules")
        _ = self.profiled  # raises UserError for other words
        if self.betas is None:  # the same settings, whether the defaults were written out or not
            object.__setattr__(self, "betas", RULES[self.optimizer].betas)
        assert self.betas is not None
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            value = getattr(self, name)
            require(value == "auto" or value >= 1, f"train.{name}={value} must be at least 1")
        require(self.lr > 0.0, f"train.lr={self.lr} must be positive")
        require(
            0 <= self.warmup_steps <= self.steps,
            f"train.warmup_steps={self.warmup_steps} must be between 0 and "
            f"train.steps={self.steps}",
        )
        require(
            (self.decay_steps is not None) == SCHEDULES[self.schedule].stable,
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
