"""Untrusted files given to the commands: one line, exit code 1, nothing run, nothing left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import tiny
from tests.helpers.commands import Done, error_of, files_of, run
from tests.helpers.faults import seen
from tests.helpers.forks import command
from tests.helpers.glue import byte_tokenizer, write_glue
from tests.helpers.strangers import write_ticket

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with release/, a model with a tokenizer of bytes, and glue/."""
    folder = tmp_path_factory.mktemp("strangers")
    tiny.model().save_pretrained(folder / "release")
    byte_tokenizer().save_pretrained(folder / "release")
    write_glue(folder / "glue")
    return folder


def tune(
    place: Path, model: str, *arguments: str, do: Callable[..., Done] = command
) -> tuple[int, str]:
    """Return the error with which launcher/finetune.py refuses ``model``."""
    before = files_of(place)
    done = do(
        "finetune.py",
        "--model",
        model,
        "--task",
        "sst2",
        "--data.glue_dir",
        "glue",
        "--train.steps",
        "1",
        *arguments,
        cwd=place,
    )
    message = error_of(done)
    assert files_of(place / "release", place / model).items() <= before.items()
    assert not list(place.rglob("results.jsonl")), "a result was written"
    return done.returncode, message


def test_a_crafted_ticket(place: Path):
    shapes = {name: tuple(param.shape) for name, param in tiny.model().named_parameters()}
    bits = {
        n: torch.full(((torch.Size(s).numel() + 7) // 8,), -2, dtype=torch.int8)
        for n, s in shapes.items()
    }
    write_ticket(place / "ticket", bits, shapes)
    code, message = tune(place, "release", "--method", "ticket", "--ticket", "ticket")
    seen("crafted ticket", code, message)


@pytest.mark.parametrize("new_name", [None, "model.norm.wieght"])
def test_missing_tensors(place: Path, new_name: str | None):
    """Training used to continue from random weights, with a result and exit code 0."""
    shutil.copytree(place / "release", place / f"part-{new_name}")
    file = place / f"part-{new_name}/model.safetensors"
    tensors = load_file(file)
    taken = tensors.pop("model.norm.weight")
    if new_name is not None:
        tensors[new_name] = taken
    save_file(tensors, file, {"format": "pt"})
    seen("missing tensors", *tune(place, f"part-{new_name}"))


def test_code_in_a_release(place: Path):
    folder = Path(shutil.copytree(place / "release", place / "code"))
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "own.py").write_text(f"open({str(place / 'ran')!r}, 'w')\n")
    seen("code in a release", *tune(place, "code", do=run))
    assert not (place / "ran").exists()
