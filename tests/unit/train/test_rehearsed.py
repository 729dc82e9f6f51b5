"""The launcher rehearses the release before it claims the run's name."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pmp_ds.commands import pretrain
from pmp_ds.errors import UserError
from pmp_ds.study.plan import rehearse_arms, steps
from pmp_ds.study.recipe import Arm, Study
from tests.helpers.faults import seen
from tests.helpers.stores import write_store


@pytest.fixture
def bert(tmp_path: Path) -> str:
    """A model that reads both ways."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    return str(tmp_path / "config.json")


def test_pretrain_refuses_before_anything_is_written(
    bert: str, tmp_path: Path, monkeypatch: Any
) -> None:
    store = write_store(tmp_path / "store", 0, 16)
    argv = ["pretrain.py", "--data.store", store, "--model.family", "auto", "--model.path", bert]
    argv += ["--run.root", f"{tmp_path}/runs", "--run.name", "both-ways"]
    monkeypatch.setattr(sys, "argv", argv)
    prepared = pretrain.prepare()
    with pytest.raises(UserError) as caught:
        prepared.run()
    seen("not causal", 1, f"error: {caught.value}")
    assert not (tmp_path / "runs").exists()


def test_a_study_refuses_before_its_first_step(bert: str, tmp_path: Path, monkeypatch: Any) -> None:
    model: Any = {"model.family": "auto", "model.path": bert, "data.store": "s"}
    arms = {"base": Arm(settings=model), "pmp": Arm(settings=model)}
    study = Study(root=str(tmp_path / "study"), arms=arms)
    planned = steps(study)
    with pytest.raises(UserError, match=r"model_type='bert' is not trained"):
        rehearse_arms(study, planned)
    rehearse_arms(study, [])  # all arms are pretrained
