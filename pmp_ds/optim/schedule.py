"""Learning rate: linear warm-up, then ``train.schedule`` (cosine in the paper, appendix A).

The rate depends only on the settings and the update, so a resumed run has the rates of an
uninterrupted one.
"""

from pmp_ds.config import TrainConfig
from pmp_ds.config.rules import RULES
from pmp_ds.config.schedules import SCHEDULES


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of update ``step``, counted from 1; the last update is ``config.steps``."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * _left(config, step))


def _left(config: TrainConfig, step: int) -> float:
    """Return how much of the fall from the peak is still ahead at ``step``: from 1 down to 0."""
    schedule, begin = SCHEDULES[config.schedule], config.warmup_steps
    if schedule.stable:
        assert config.decay_steps is not None
        begin = config.steps - config.decay_steps
        if step <= begin or config.decay_steps == 0:
            return 1.0
    return schedule.left(min(1.0, (step - begin) / max(1, config.steps - begin)))


def first_change(before: TrainConfig, now: TrainConfig, done: int) -> int | None:
    """Return the first of ``done`` updates whose rate differs between two settings, or None."""
    updates = range(1, done + 1)
    return next((n for n in updates if learning_rate(before, n) != learning_rate(now, n)), None)


def in_words(config: TrainConfig) -> str:
    """Return rule and schedule as a model card states them."""
    after = SCHEDULES[config.schedule].title.format(
        updates=f"{config.steps:,}", decay=f"{config.decay_steps or 0:,}"
    )
    return (
        f"{RULES[config.optimizer].title}, peak learning rate {config.lr:g}, "
        f"{config.warmup_steps:,} updates of linear warm-up, {after}, gradient norm clipped at "
        f"{config.clip_norm:g}"
    )
