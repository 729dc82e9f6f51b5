"""Learning rate: linear warm-up, then a cosine (paper, appendix A)."""

import math

from pmp_ds.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of update ``step``, counted from 1; the last update is ``config.steps``."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)
