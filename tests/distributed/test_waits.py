"""Between two validations or checkpoints the host waits for nothing and gathers nothing."""

import json
from itertools import product

import pytest

from tests.helpers.lives import waits_written
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

FLAGS = ("--run.checkpoint_every", "12", "--guard.hang_seconds", "600")
UPDATES = [f"update {step}" for step in range(2, 12)]


@pytest.mark.parametrize(
    ("stage", "precision"),
    daily(
        product(range(4), ("fp32", "bf16")), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
    ),
)
def test_our_code_asks_for_nothing(lives, tmp_path, stage, precision):
    where = tmp_path / "waits"
    flags = (*FLAGS, "--train.precision", precision)
    one, _ = lives(*flags, fault=waits_written, given=(str(where),), stage=stage)
    assert one.code == 0, one.err
    for rank in (0, 1):
        found = json.loads((tmp_path / f"waits.{rank}").read_text())
        ours = {
            update: asked
            for update in UPDATES
            if (asked := {k: n for k, n in found.get(update, {}).items() if "pmp_ds" in k})
        }
        assert ours == {}
        assert any("pmp_ds" in who for who in found["update 12"]), "nothing is counted at all"


def test_a_policy_that_waits_says_so(lives, tmp_path):
    """The loss and the check of the gradients wait once per update."""
    where = tmp_path / "waits"
    lives(*FLAGS, "--guard.nonfinite", "skip", fault=waits_written, given=(str(where),))
    found = json.loads((tmp_path / "waits.0").read_text())
    early = "pmp_ds: read in the update that sent it"
    assert all(early in found[update] for update in UPDATES)
    assert all("pmp_ds: _local_scalar_dense" in found[update] for update in UPDATES)
