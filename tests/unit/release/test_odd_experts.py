"""A release of experts that transformers' default refuses names the implementation that computes
them; no other release does."""

import json
from pathlib import Path

import pytest
import torch

from pmp_ds.release.allow_list import problems
from pmp_ds.release.export import export
from pmp_ds.release.rehearsal import rehearse
from tests.helpers.odd_models import GPT_OSS, LLAMA, MIXTRAL, odd_config
from tests.unit.release.conftest import CARD, write_weights

REGULAR = {"hidden_size": 16, "intermediate_size": 24}


@pytest.mark.processes
def test_a_stranger_loads_it(tmp_path: Path, tokenizer_dir: Path) -> None:
    """In a fresh process without pmp_ds."""
    weights = write_weights(tmp_path / "weights", odd_config(GPT_OSS), torch.bfloat16)
    out = tmp_path / "release"
    summary = export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD)
    assert summary.logits_difference == 0
    assert json.loads((out / "config.json").read_text())["experts_implementation"] == "eager"
    assert problems(out) == []


@pytest.mark.parametrize(("kind", "sizes"), [(MIXTRAL, REGULAR), (LLAMA, {})])
@pytest.mark.usefixtures("no_reload")
def test_other_releases_do_not_name_it(
    kind: str, sizes: dict[str, int], tmp_path: Path, tokenizer_dir: Path
) -> None:
    weights = write_weights(tmp_path / "weights", odd_config(kind, **sizes), torch.bfloat16)
    export(weights, tmp_path / "release", tokenizer_dir=tokenizer_dir, card=CARD)
    assert "experts_implementation" not in (tmp_path / "release" / "config.json").read_text()


@pytest.mark.parametrize("kind", [GPT_OSS, MIXTRAL])
def test_odd_widths_are_rehearsed(kind: str) -> None:
    rehearse(odd_config(kind))
    rehearse(odd_config(kind, hidden_size=64, intermediate_size=1364))
