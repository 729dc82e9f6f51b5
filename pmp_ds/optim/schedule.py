"""Learning rate: linear warm-up, then ``train.schedule`` (cosine in the paper, appendix A).

The rate depends only on the settings and the update, so a resumed run has the rates of an
uninterrupted one.
"""

import math

from pmp_ds.config import TrainConfig

_OPTIMIZERS = {"adamw": "AdamW", "lion": "Lion", "sgd": "SGD with momentum"}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of update ``step``, counted from 1; the last update is ``config.steps``."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * _left(config, step))


def _left(config: TrainConfig, step: int) -> float:
    """Return the part of the decay that is still ahead at ``step``, from 1 down to 0."""
    if config.schedule == "constant":
        return 1.0
    begin = config.warmup_steps
    if config.schedule == "wsd":
        assert config.decay_steps is not None
        begin = config.steps - config.decay_steps
        if step <= begin or config.decay_steps == 0:
            return 1.0
    progress = min(1.0, (step - begin) / max(1, config.steps - begin))
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress


def first_change(before: TrainConfig, now: TrainConfig, done: int) -> int | None:
    """Return the first of ``done`` updates whose rate differs between two settings, or None."""
    updates = range(1, done + 1)
    return next((n for n in updates if learning_rate(before, n) != learning_rate(now, n)), None)


def in_words(config: TrainConfig) -> str:
    """Return optimizer and schedule in the words of a model card."""
    after = {
        "cosine": f"cosine over {config.steps:,} updates",
        "linear": f"linear decay over {config.steps:,} updates",
        "constant": f"constant over {config.steps:,} updates",
        "wsd": f"constant, then linear decay over the last {config.decay_steps or 0:,} of "
        f"{config.steps:,} updates",
    }[config.schedule]
    return (
        f"{_OPTIMIZERS[config.optimizer]}, peak learning rate {config.lr:g}, "
        f"{config.warmup_steps:,} updates of linear warm-up, {after}, gradient norm clipped at "
        f"{config.clip_norm:g}"
    )
