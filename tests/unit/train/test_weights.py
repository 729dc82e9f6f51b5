"""`init.weights` before a run begins: a folder that does not fit is refused in one line, and
nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmp_ds.cli import parse
from pmp_ds.config import Config
from pmp_ds.errors import UserError
from pmp_ds.study.plan import rehearse_arms, steps
from pmp_ds.study.recipe import Arm, Study
from tests.helpers import tiny
from tests.helpers.bases import write_base
from tests.helpers.commands import call, error_of
from tests.helpers.workdir import furnish


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    furnish(folder, call)
    return folder


@pytest.fixture
def refused(place: Path, tmp_path: Path) -> Callable[..., str]:
    """Return the error of a start from ``tmp_path``/base, which writes nothing."""

    def start(*flags: str) -> str:
        given = ("--run.root", tmp_path / "runs", "--init.weights", tmp_path / "base")
        message = error_of(call("pretrain.py", "--config", "tiny.yaml", *given, *flags, cwd=place))
        assert not (tmp_path / "runs").exists()
        return message

    return start


def test_no_folder(refused, tmp_path):
    assert f"init.weights={tmp_path}/base is not a folder" in refused()
    (tmp_path / "base").mkdir()
    assert "base is not a model: it has no config.json" in refused()


def test_another_model(refused, place, tmp_path):
    write_base(tmp_path / "base", place / "store", tiny.LLAMA_TIED)
    message = refused()
    assert f"init.weights={tmp_path}/base: its config.json has " in message
    assert "set model.family=auto without model.path" in message


def test_another_vocabulary(refused, place, tmp_path):
    other = tiny.ModelConfig(**vars(tiny.LLAMA) | {"vocab_size": 512})
    write_base(tmp_path / "base", place / "store", other)
    message = refused()
    assert "its vocabulary has 512 rows" in message
    assert f"prepare the data with --tokenizer {tmp_path}/base" in message


def test_another_tokenizer(refused, place, tmp_path):
    """It has as many tokens, in another order."""
    write_base(tmp_path / "base", place / "store")
    path = tmp_path / "base" / "tokenizer.json"
    shutil.copy(place / "store" / "tokenizer" / "tokenizer.json", path)
    values = json.loads(path.read_text())
    ids = values["model"]["vocab"]
    one, other = list(ids)[-2:]
    ids[one], ids[other] = ids[other], ids[one]
    path.write_text(json.dumps(values))
    assert f"prepare it with --tokenizer {tmp_path}/base" in refused()


def test_a_seed_as_well(refused):
    assert "init.seed=1 and init.weights=" in refused("--init.seed", "1")


def test_auto_needs_a_description():
    with pytest.raises(UserError, match=r"set model\.path, or init\.weights"):
        parse(Config, ["--model.family", "auto"])
    config, _ = parse(Config, ["--model.family", "auto", "--init.weights", "somewhere"])
    assert config.model.path is None
    assert not config.init.is_drawn_in_secret
    assert Config().init.is_drawn_in_secret


def test_a_study_rehearses_the_model_of_the_folder(place, tmp_path):
    write_base(tmp_path / "base", place / "store")
    model: Any = {"model.family": "auto", "init.weights": str(tmp_path / "base"), "data.store": "s"}
    arms = {"base": Arm(settings=model), "pmp": Arm(settings=model)}
    study = Study(root=str(tmp_path / "study"), arms=arms)
    rehearse_arms(study, planned := steps(study))
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"bert"'))
    with pytest.raises(UserError, match=r"model_type='bert'"):
        rehearse_arms(study, planned)
