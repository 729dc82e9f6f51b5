import math

import pytest

from pmp_ds.config import TrainConfig
from pmp_ds.errors import UserError
from pmp_ds.optim.schedule import first_change, in_words, learning_rate


def rates(**settings) -> list[float]:
    """Return the rates of update 1 to the last."""
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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "linear"}, [4, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ({"schedule": "linear", "min_lr_ratio": 0.5}, [4, 8, 7.5, 7, 6.5, 6, 5.5, 5, 4.5, 4]),
        ({"schedule": "constant"}, [4, *[8] * 9]),
        ({"schedule": "wsd", "decay_steps": 4}, [4, 8, 8, 8, 8, 8, 6, 4, 2, 0]),
        ({"schedule": "wsd", "decay_steps": 8}, [4, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ({"schedule": "wsd", "decay_steps": 0}, [4, *[8] * 9]),
        ({"schedule": "wsd", "decay_steps": 1, "min_lr_ratio": 0.25}, [4, *[8] * 8, 2]),
    ],
)
def test_ten_updates_by_hand(settings, expected):
    assert rates(lr=8.0, warmup_steps=2, steps=10, **settings) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "wsd"},
        {"decay_steps": 3},
        {"schedule": "wsd", "decay_steps": 9},
        {"schedule": "wsd", "decay_steps": -1},
    ],
)
def test_decay_that_does_not_fit(settings):
    with pytest.raises(UserError, match="decay_steps"):
        TrainConfig(steps=10, warmup_steps=2, **settings)


def test_first_change():
    """A decay over the last 4 of 10 updates begins with update 7."""
    stable = TrainConfig(schedule="wsd", steps=10, warmup_steps=2, decay_steps=0)
    decay = TrainConfig(schedule="wsd", steps=10, warmup_steps=2, decay_steps=4)
    assert first_change(stable, decay, 6) is None
    assert first_change(stable, decay, 7) == first_change(stable, decay, 9) == 7


def test_in_words():
    paper = "AdamW, peak learning rate 2e-05, 2,000 updates of linear warm-up, cosine over 20,000"
    assert in_words(TrainConfig()) == f"{paper} updates, gradient norm clipped at 1"
    wsd = TrainConfig(optimizer="lion", schedule="wsd", decay_steps=1000)
    said = in_words(wsd)
    assert said.startswith("Lion, ")
    assert "constant, then linear decay over the last 1,000 of 20,000 updates" in said
