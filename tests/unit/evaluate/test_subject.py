"""The measured model, and folders without a model."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmp_ds.errors import UserError
from pmp_ds.evaluate.subject import Subject
from pmp_ds.model.parameters import weights_digest
from tests.helpers import tiny


def test_reads_bf16_exactly(release: Path, tmp_path: Path):
    tiny.model().to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    subject = Subject.open(tmp_path / "bf16")
    read = subject.reader()
    for name, param in subject.model.named_parameters():
        assert param.dtype == torch.float32
        assert read(name).dtype == torch.bfloat16
        assert torch.equal(param, read(name).float())
    expected = tiny.model().to(torch.bfloat16).float()
    assert weights_digest(subject.model) == weights_digest(expected)
    assert subject.digest != Subject.open(release).digest
    with pytest.raises(UserError, match=r"has no tokenizer.json: it is needed to read text"):
        _ = subject.tokenizer


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", None, "is not a model: it has no config.json"),
        ("config.json", b"{", "config.json is damaged: "),
        ("config.json", b'{"model_type": "unheard-of"}', "no architecture 'unheard-of'"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", b"torn", "model.safetensors is damaged"),
    ],
)
def test_damaged(release: Path, tmp_path: Path, name: str, change: bytes | None, message: str):
    folder = Path(shutil.copytree(release, tmp_path / "copy"))
    (folder / name).unlink()
    if change is not None:
        (folder / name).write_bytes(change)
    with pytest.raises(UserError, match=message):
        Subject.open(folder)


def test_a_missing_weight_is_no_random_one(release: Path, tmp_path: Path):
    folder = Path(shutil.copytree(release, tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model.norm.weight: it is not a whole causal model"):
        Subject.open(folder)
