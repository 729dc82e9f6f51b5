"""Rule and schedule of a fine-tuning: the loop's inputs, and the fields of results."""

import pytest

from pmp_ds.errors import UserError
from pmp_ds.finetune.config import TuneTrainConfig


def test_results_record_what_they_recorded_before():
    """The key of a result is unchanged, so a finished cell of an older file is not run again."""
    assert TuneTrainConfig(micro_batch_size=4).facts() == {
        "lr": 5e-5,
        "epochs": 3.0,
        "global_batch_size": 32,
        "warmup_ratio": 0.06,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "precision": "fp32",
    }


def test_results_record_another_rule_and_schedule():
    facts = TuneTrainConfig(optimizer="lion", schedule="wsd", steps=10).facts()
    assert (facts["optimizer"], facts["schedule"]) == ("lion", "wsd")
    assert (facts["decay_ratio"], facts["steps"]) == (0.2, 10)
    assert "decay_ratio" not in TuneTrainConfig(schedule="linear").facts()


def test_the_loop_receives_them():
    loop = TuneTrainConfig(optimizer="lion", schedule="wsd", decay_ratio=0.5).complete(320, 1)
    assert (loop.steps, loop.warmup_steps, loop.decay_steps) == (30, 2, 15)
    assert (loop.optimizer, loop.betas) == ("lion", (0.9, 0.99))
    assert TuneTrainConfig().complete(320, 1).decay_steps is None


def test_a_decay_that_has_no_room():
    TuneTrainConfig(warmup_ratio=0.9)  # no decay, so none that needs room
    with pytest.raises(UserError, match=r"decay_ratio=0\.2 must be between 0 and"):
        TuneTrainConfig(warmup_ratio=0.9, schedule="wsd")
