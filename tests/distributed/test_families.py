"""A few architectures from a config.json to a classifier; `make families` tests all."""

from pathlib import Path

import pytest

from tests.helpers.families import QUICK, trial
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("kind", daily(QUICK, ["deepseek_v3", "gpt2", "llama"]))
def test_pretrained_released_and_tuned(ranks1, kind: str, tmp_path: Path):
    row = ranks1.run(trial, kind, tmp_path)[0]
    assert (row.pretrained, row.tuned) == ("yes", "yes")
    assert row.released in ("same logits", "logits within rounding")
