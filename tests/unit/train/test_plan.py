"""The memory announced by a run depends on its optimizer's rule, moments and master weights."""

import pytest

from pmp_ds.config import Config, TrainConfig
from pmp_ds.train.budget import Budget
from pmp_ds.train.plan import _memory

SHAPES, KEPT = {"w": (1000, 1000)}, 7 * 10**5


@pytest.mark.parametrize(
    ("optimizer", "moments", "dense", "total"), [("adamw", 5.7, 8.0, 13.7), ("sgd", 2.9, 4.0, 10.9)]
)
def test_moments(optimizer, moments, dense, total):
    """A million elements, 70% in the ticket, fp32 without ZeRO: 4 bytes of weights, 4 of gradients;
    moments of 4 bytes each on the ticket, and a bit of mask per element."""
    config = Config(train=TrainConfig(optimizer=optimizer, precision="fp32"))
    said = _memory(Budget(SHAPES, KEPT, config, {}, 1))
    assert said.startswith(f"per rank {total} MB")
    assert f"moments and mask {moments} (dense fp32 moments {dense})" in said


@pytest.mark.parametrize(
    ("moments", "master", "total", "of_master", "of_moments"),
    [
        ("fp32", "dense", 13.7, 4.0, 5.7),
        ("fp32", "compact", 12.5, 2.8, 5.7),
        ("bf16", "compact", 9.7, 2.8, 2.9),
        ("bf16", "split", 8.3, 1.4, 2.9),
        ("int8", "dense", 9.5, 4.0, 1.5),
    ],
)
def test_fewer_bits(moments, master, total, of_master, of_moments):
    """bf16 at ZeRO 1: 2 bytes of weights and 2 of gradients besides."""
    config = Config(train=TrainConfig(moments=moments))
    json = {"zero_optimization": {"stage": 1}, "pmp_ds": {"master": master}}
    said = _memory(Budget(SHAPES, KEPT, config, json, 1))
    assert said.startswith(f"per rank {total} MB")
    assert f"master {of_master}, moments and mask {of_moments} (dense" in said
