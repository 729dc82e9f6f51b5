"""The scores that top-k ranks: |g| of one update, or its running mean (paper, Eq. 2).

They are updated in place on the gradient shards that a rank owns. Only their order matters, so the
running mean is kept as a running sum, and the exponential mean has no bias correction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pmp_ds.errors import UserError


@dataclass(frozen=True)
class Score:
    """One value of ``mask.score``."""

    name: str
    add: Callable[[torch.Tensor, torch.Tensor, float, float], None] | None
    """Takes a fragment's running score, its gradient, the gradient's scale and
    ``mask.score_decay``. None: the gradient itself is ranked and nothing is stored."""


def _mean(value: torch.Tensor, gradient: torch.Tensor, scale: float, decay: float) -> None:
    value.add_(gradient.abs(), alpha=1.0 / scale)


def _ema(value: torch.Tensor, gradient: torch.Tensor, scale: float, decay: float) -> None:
    value.mul_(decay).add_(gradient.abs(), alpha=(1.0 - decay) / scale)


SCORES = {
    score.name: score
    for score in (Score("mean", _mean), Score("ema", _ema), Score("gradient", None))
}


def find_score(name: str) -> Score:
    """Return the score called ``name``. Raises UserError that lists all names."""
    if name not in SCORES:
        raise UserError(f"mask.score={name!r} is unknown; the scores are {', '.join(SCORES)}")
    return SCORES[name]


class Scores:
    """Running scores of the local fragments: 4 bytes per local element, none for `gradient`."""

    def __init__(self, name: str, decay: float = 0.95) -> None:
        self.score = find_score(name)
        self.decay = decay
        self.values: list[torch.Tensor] | None = None

    def update(self, gradients: Sequence[torch.Tensor], scale: float = 1.0) -> list[torch.Tensor]:
        """Add one update's reduced gradients and return the values to rank.

        ``gradients``: (n_i,) each, any float dtype, times ``scale`` (the loss scale of fp16). The
        result ranks by magnitude, so a score may return the gradients themselves, without a copy.
        """
        if self.score.add is None:
            return list(gradients)
        if self.values is None:
            self.values = [torch.zeros_like(g, dtype=torch.float32) for g in gradients]
        for value, gradient in zip(self.values, gradients, strict=True):
            self.score.add(value, gradient, scale, self.decay)
        return self.values
