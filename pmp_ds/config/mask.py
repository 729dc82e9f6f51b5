"""How the ticket is found: `mask`."""

from dataclasses import dataclass
from typing import Literal

from pmp_ds.errors import require


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
