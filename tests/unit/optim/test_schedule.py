import math

import pytest

from pmp_ds.config import TrainConfig
from pmp_ds.optim.schedule import learning_rate


def rates(**settings) -> list[float]:
    """Of update 1 to the last."""
    config = TrainConfig(**settings)
    return [learning_rate(config, step) for step in range(1, config.steps + 1)]


def test_by_hand():
    """Warm-up in quarters, then the cosine at 1/4, 1/2, 3/4 and 1 of its half turn."""
    found = rates(lr=8.0, warmup_steps=4, steps=8)
    half = math.sqrt(0.5)
    assert found == pytest.approx([2, 4, 6, 8, 4 * (1 + half), 4, 4 * (1 - half), 0], abs=1e-12)


def test_min_lr_ratio_is_the_last_update():
    found = rates(lr=8.0, warmup_steps=0, steps=4, min_lr_ratio=0.5)
    half = math.sqrt(0.5)
    assert found == pytest.approx([6 + 2 * half, 6, 6 - 2 * half, 4], abs=1e-12)


def test_no_warm_up():
    assert rates(lr=1.0, warmup_steps=0, steps=2) == pytest.approx([0.5, 0.0], abs=1e-12)


def test_warm_up_alone():
    assert rates(lr=1.0, warmup_steps=4, steps=4) == [0.25, 0.5, 0.75, 1.0]


def test_single_update():
    assert rates(lr=1.0, warmup_steps=1, steps=1) == [1.0]
    assert rates(lr=1.0, warmup_steps=0, steps=1, min_lr_ratio=0.25) == [0.25]


def test_constant():
    assert rates(lr=3.0, warmup_steps=0, steps=9, min_lr_ratio=1.0) == [3.0] * 9


def test_papers_schedule():
    """2,000 updates of warm-up to 2e-5, 20,000 in all."""
    config = TrainConfig()
    assert learning_rate(config, 1) == 1e-8
    assert learning_rate(config, 2000) == 2e-5
    assert learning_rate(config, 11000) == pytest.approx(1e-5, rel=1e-12)
    assert learning_rate(config, 20000) == 0.0


def test_rises_then_falls():
    found = rates(lr=1.0, warmup_steps=30, steps=100, min_lr_ratio=0.1)
    assert found[:30] == sorted(found[:30])
    assert found[29:] == sorted(found[29:], reverse=True)
    assert min(found[29:]) == pytest.approx(0.1)


def test_beyond_the_last_update_it_stays():
    config = TrainConfig(lr=1.0, warmup_steps=0, steps=5, min_lr_ratio=0.2)
    assert learning_rate(config, 6) == learning_rate(config, 5) == pytest.approx(0.2)
