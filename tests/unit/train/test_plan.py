"""The memory announced by a run depends on the rule of its optimizer."""

import pytest

from pmp_ds.config import Config, TrainConfig
from pmp_ds.train.plan import _memory


@pytest.mark.parametrize(
    ("optimizer", "moments", "dense", "total"), [("adamw", 5.7, 8.0, 13.7), ("sgd", 2.9, 4.0, 10.9)]
)
def test_moments(optimizer, moments, dense, total):
    """A million elements, 70% in the ticket, fp32 without ZeRO: 4 bytes of weights, 4 of gradients;
    moments of 4 bytes each on the ticket, and a bit of mask per element."""
    config = Config(train=TrainConfig(optimizer=optimizer, precision="fp32"))
    said = _memory(config, {}, 10**6, 7 * 10**5, 1)
    assert said.startswith(f"per rank {total} MB")
    assert f"moments and mask {moments} (dense moments {dense})" in said
