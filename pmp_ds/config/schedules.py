"""The schedules of the learning rate after the warm-up, each with everything that differs.

A new one is a ``Schedule`` in ``SCHEDULES``. Nothing here imports torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One value of ``train.schedule``."""

    name: str
    left: Callable[[float], float]
    """Takes the progress of the decay, from 0 to 1, and returns the part that is still ahead, from
    1 down to 0."""

    title: str
    """The words of a model card, with the number of `{updates}` and of `{decay}` updates."""

    stable: bool = False
    """Whether the rate stays at the peak until the last ``train.decay_steps`` updates."""


_ALL = (
    Schedule(
        name="cosine",
        left=lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
        title="cosine over {updates} updates",
    ),
    Schedule(
        name="linear",
        left=lambda progress: 1.0 - progress,
        title="linear decay over {updates} updates",
    ),
    Schedule(
        name="constant",
        left=lambda progress: 1.0,
        title="constant over {updates} updates",
    ),
    Schedule(
        name="wsd",
        left=lambda progress: 1.0 - progress,
        title="constant, then linear decay over the last {decay} of {updates} updates",
        stable=True,
    ),
)
SCHEDULES: dict[str, Schedule] = {one.name: one for one in _ALL}
