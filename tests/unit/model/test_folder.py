"""Untrusted model folders: complete, without code, and no larger than their files."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from pmp_ds.errors import UserError
from pmp_ds.model.folder import open_folder, open_tensors, open_tokenizer
from tests.helpers import tiny

Change = Callable[[Path], object]
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "release"
    tiny.model().save_pretrained(folder)
    return folder


@pytest.fixture
def release(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "release"))


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        edit(content)
        save_file(content, folder / "model.safetensors", {"format": "pt"})

    return change


def index(name: str) -> Change:
    def change(folder: Path) -> None:
        names = list(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        content = {"weight_map": dict.fromkeys(names, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


def moved_out(folder: Path) -> None:
    file = folder / "model.safetensors"
    (file.rename(folder.parent / "weights")).chmod(0o600)
    file.symlink_to("../weights")


def fifo(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def renamed(content: dict[str, torch.Tensor]) -> None:
    content["model.norm.wieght"] = content.pop(NORM)


FOLDERS: dict[str, tuple[Change, str]] = {
    "lacks one": (tensors(lambda t: t.pop(NORM)), f"lacks {NORM}: it is not a whole causal model"),
    "lacks many": (
        tensors(lambda t: [t.pop(n) for n in list(t) if "layers.1" in n]),
        " and 6 more: it is no",
    ),
    "misnamed": (tensors(renamed), f"lacks {NORM}: it is not a whole"),
    "one more": (tensors(lambda t: t.update(extra=torch.ones(2))), "has unknown tensors: extra"),
    "a head": (
        tensors(lambda t: t.update({"score.weight": torch.ones(2, 32)})),
        "tensors: score.weight",
    ),
    "code": (config(auto_map={"AutoModelForCausalLM": "m.M"}), "has auto_map: it brings code"),
    "code below": (config(text_config={"auto_map": {}}), "has auto_map: it brings code"),
    "another config": (config(configuration_files=["config.4.0.0.json"]), "another config file"),
    "another file": (config(transformers_weights="../x.safetensors"), "another weight file"),
    "quantized": (config(quantization_config={"quant_method": "awq"}), "it is quantized"),
    "attention of the hub": (
        config(_attn_implementation="who/what"),
        "_attn_implementation='who/what', which may be",
    ),
    "attention of the hub, by part": (
        config(attn_implementation={"": "eager", "x": "who/what"}),
        "may be code from the hub",
    ),
    "experts of the hub": (config(experts_implementation="who/what"), "may be code from the hub"),
    "layers": (config(num_hidden_layers=10**9), "num_hidden_layers=1e+09, more than the 1,024"),
    "heads": (config(num_attention_heads=1 << 20), "num_attention_heads=1.04858e+06, more than"),
    "vocabulary": (config(vocab_size=1 << 40), "vocab_size=1.09951e+12, more than the 16,777,216"),
    "width": (config(intermediate_size=1 << 72), "intermediate_size=4.72237e+21, more than"),
    "larger than the files": (config(vocab_size=1 << 23), "parameters, but the files contain"),
    "more layers than the files": (
        config(num_hidden_layers=900),
        "describes 900 layers, but the files contain",
    ),
    "unknown": (config(model_type="unheard-of"), "transformers has no architecture 'unheard-of'"),
    "an encoder": (config(model_type="vit"), "'vit' is not a causal language model"),
    "nonsense": (config(hidden_size="much"), "config.json is not usable"),
    "no heads": (config(num_attention_heads=0), "config.json"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "it is not a JSON object"),
    "nested": (lambda f: (f / "config.json").write_text("[" * 10**6), "config.json is damaged"),
    "torn": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "fifo": (fifo, "config.json is not a regular file"),
    "device": (
        lambda f: (f / "added.json").symlink_to("/dev/zero"),
        "added.json is a link that leads out",
    ),
    "link": (moved_out, "model.safetensors is a link that leads out of the folder"),
    "weight map outside": (index("../outside.safetensors"), "points to '../outside.safetensors'"),
    "weight map, absolute": (index("/etc/passwd"), "points to '/etc/passwd'"),
    "weight map, pickle": (index("x.bin"), "points to 'x.bin', which is not a .safetensors"),
    "weight map, missing": (index("x.safetensors"), "x.safetensors is missing"),
    "two forms": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "has both model.safet",
    ),
    "pickle": (pickled, "pytorch_model.bin may run code when it is read"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter: merge it"),
    "weights torn": (
        lambda f: (f / "model.safetensors").write_bytes(b"torn"),
        "model.safetensors is damaged",
    ),
    "nothing": (shutil.rmtree, "is not a folder"),
}


@pytest.mark.parametrize(("change", "message"), FOLDERS.values(), ids=FOLDERS)
def test_refused(release: Path, change: Change, message: str) -> None:
    change(release)
    with pytest.raises(UserError) as caught:
        open_folder(release).load()
    assert message in str(caught.value)
    assert str(release) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_folder_unchanged(release: Path) -> None:
    found = open_folder(release)
    found.require_names()
    for (name, one), (_, other) in zip(
        found.load().named_parameters(), tiny.model().named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_code_is_not_run_whatever_is_answered(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks "[y/N]" where trust_remote_code is not False."""
    ran = tmp_path / "ran"
    (release / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config(model_type="own", auto_map={"AutoConfig": "own.C"})(release)
    settings = {"auto_map": {"AutoTokenizer": ["own.T", None]}}
    (release / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for opener in (open_folder, open_tokenizer):
        with pytest.raises(UserError, match="auto_map: it brings code of its own"):
            opener(release)
    assert not ran.exists()


@pytest.mark.parametrize("drop", [None, NORM, "lm_head.weight"])
def test_a_new_head_is_drawn_and_nothing_else(release: Path, drop: str | None) -> None:
    if drop is not None:
        tensors(lambda t: t.pop(drop))(release)
    opened = open_folder(release)
    opened.config.num_labels = 3
    torch.manual_seed(7)
    if drop == NORM:
        with pytest.raises(UserError, match=f"lacks {NORM}"):
            opened.load(AutoModelForSequenceClassification, opened.config)
        return
    one = opened.load(AutoModelForSequenceClassification, opened.config)
    torch.manual_seed(7)
    other = AutoModelForSequenceClassification.from_pretrained(release, num_labels=3)
    assert torch.equal(one.score.weight, other.score.weight), "the draws changed"


def test_a_snapshot_of_the_hubs_cache(release: Path, tmp_path: Path) -> None:
    """Its files are links to `blobs`."""
    blobs, snapshot = tmp_path / "m/blobs", tmp_path / "m/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in release.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    open_folder(snapshot).require_names()


def test_shards(release: Path) -> None:
    content = load_file(release / "model.safetensors")
    (release / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(content):
        weight_map[name] = f"{number}.safetensors"
        save_file({name: content[name]}, release / weight_map[name], {"format": "pt"})
    (release / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    assert open_tensors(release).keys() == content.keys()
    open_folder(release).load()
