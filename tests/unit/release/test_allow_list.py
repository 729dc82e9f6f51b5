"""Each forbidden item, planted in a clean release, is named; the clean release passes."""

import getpass
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmp_ds.errors import UserError
from pmp_ds.prepare.spm import train_model
from pmp_ds.release import allow_list
from pmp_ds.release.allow_list import problems, require_clean
from pmp_ds.release.export import export
from pmp_ds.release.tokenizer_files import copy_tokenizer
from pmp_ds.run_dir import sha256
from tests.unit.release.conftest import CARD, llama, write_weights


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("clean")
    weights = write_weights(root / "weights", llama(True), torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pmp_ds.release.export.verify_reload", lambda *_: 0.0)
        export(
            weights, root / "release", tokenizer_dir=tokenizer_dir, card=CARD, max_shard_size=9000
        )
    return root / "release"


@pytest.fixture
def release(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "release"))


def sums_again(folder: Path) -> None:
    """Write the checksums again, so that the planted item is found for itself."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def add(name: str, content: str = "x") -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return plant


def key(name: str, **values: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return plant


def other_map(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = index["weight_map"].values()
    turned = [*list(files)[1:], next(iter(files))]
    index["weight_map"] = dict(zip(index["weight_map"], turned, strict=True))
    path.write_text(json.dumps(index))


def say(text: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "README.md"
        path.write_text(f"{path.read_text()}\n{text}\n")

    return plant


def tensors(change: Callable[[dict[str, Any]], object], **metadata: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        content = load_file(path)
        change(content)
        save_file(content, path, {"format": "pt"} | metadata)

    return plant


def float_tensor(content: dict[str, Any]) -> None:
    name = next(iter(content))
    content[name] = content[name].float()


def trained_on(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(remembering_model())


def remembering_model() -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(train_model(["a few words, and some more of them"] * 50, 300))
    proto.trainer_spec.input.append("/home/alice/corpus.txt")
    proto.trainer_spec.model_prefix = "alice-spm"
    return bytes(proto.SerializeToString())


def no_dtype(folder: Path) -> None:
    """Make a release of an older version, which has only the newer name."""
    config = json.loads((folder / "config.json").read_text())
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(config | {"dtype": float("nan")}))


PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "optimizer file": (add("optimizer.pt"), "optimizer.pt: not a file of a release"),
    "ticket file": (add("mask.safetensors"), "mask.safetensors: not a file"),
    "hidden file": (add(".cache"), ".cache: not a file"),
    "folder": (add("private/key"), "private: not a regular file"),
    "link": (lambda f: (f / "tokenizer.model").symlink_to("/etc/hostname"), "not a regular file"),
    "program": (lambda f: (f / "config.json").chmod(0o755), "config.json: its mode"),
    "missing card": (lambda f: (f / "README.md").unlink(), "README.md: missing"),
    "config key": (key("config.json", pmp_density=0.7), "the key 'pmp_density'"),
    "hidden config key": (key("config.json", _name_or_path="x"), "the key '_name_or_path'"),
    "run path": (key("config.json", hidden_act="/home/al/run"), "an absolute path"),
    "wrong dtype": (key("config.json", dtype="float32"), "says float32, but the weights are"),
    "no dtype": (no_dtype, "config.json is not usable"),
    "older name": (key("config.json", rope_theta=7.0), "rope_theta is 7.0, but its newer name"),
    "older dtype": (key("config.json", torch_dtype="float32"), "torch_dtype is 'float32', but"),
    "generation key": (key("generation_config.json", _from="x"), "the key '_from'"),
    "tokenizer key": (key("tokenizer_config.json", name_or_path="x"), "the key 'name_or_path'"),
    "tokenizer.json key": (key("tokenizer.json", made_by="x"), "the key 'made_by'"),
    "index key": (
        key("model.safetensors.index.json", metadata={"total_size": 1, "step": 3}),
        "the key 'step'",
    ),
    "index map": (other_map, "its weight_map does not match the files"),
    "metadata": (tensors(lambda _: None, ticket="abc"), "its metadata are"),
    "optimizer state": (
        tensors(lambda t: t.update(exp_avg_sq=torch.zeros(3))),
        "has unknown tensors: exp_avg_sq",
    ),
    "fp32 tensor": (tensors(float_tensor), "contains tensors of BF16, F32"),
    "other weights": (
        lambda f: shutil.copy(next(f.glob("model-*")), f / "model.safetensors"),
        "has both model.safetensors and model.safetensors.index.json",
    ),
    "training paths": (trained_on, "remembers '/home/alice/corpus.txt'"),
    "absolute path": (say("Trained in /home/alice/runs."), "'/home/alice/runs.' is an absolute"),
    "home": (say("see ~/notes"), "an absolute path"),
    "run": (say("from runs/secret-project"), "a path inside a run"),
    "time": (say("at 12:34:56"), "'12:34:56' is a time of day"),
    "time stamp": (say("2026-01-31T12"), "a time of day"),
    "seconds": (say("1767225600.25"), "a time in seconds"),
    "state": (say("exp_avg of layer 3"), "a name from training"),
    "user": (say("by somebody-unusual"), "the name of this user"),
    "host": (say("on box-17"), "the name of this host"),
}


@pytest.fixture(autouse=True)
def named_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "somebody-unusual")
    monkeypatch.setattr(socket, "gethostname", lambda: "box-17.example.org")


@pytest.mark.parametrize(("plant", "named"), PLANTED.values(), ids=PLANTED)
def test_planted(release: Path, plant: Callable[[Path], None], named: str) -> None:
    plant(release)
    sums_again(release)
    found = problems(release)
    assert any(named in problem for problem in found), found
    with pytest.raises(UserError, match="must not be published"):
        require_clean(release)


def test_clean_passes(clean: Path) -> None:
    assert problems(clean) == []
    require_clean(clean)


def test_a_release_of_before_passes(release: Path) -> None:
    """An older release lacks the older names, and its tokenizer says less."""
    for file, keys in (
        ("config.json", ("rope_theta", "torch_dtype")),
        ("tokenizer_config.json", ("add_bos_token", "model_input_names", "pad_token", "bos_token")),
    ):
        values = json.loads((release / file).read_text())
        assert file == "tokenizer_config.json" or values.keys() >= set(keys)
        kept = {key: value for key, value in values.items() if key not in keys}
        (release / file).write_text(json.dumps(kept))
    sums_again(release)
    assert problems(release) == []


def test_sums(release: Path) -> None:
    (release / "README.md").write_text("another")
    assert problems(release) == ["README.md: does not match SHA256SUMS"]
    (release / "SHA256SUMS").write_text("")
    assert problems(release) == ["SHA256SUMS: does not name every file once"]


def test_common_names_of_machines_tell_nothing(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    say("the root of localhost")(release)
    sums_again(release)
    assert problems(release) == []


def test_a_user_named_after_its_number_tells_nothing(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Podman writes such a name into a container's passwd file; 1024 may be a width of the
    model."""
    monkeypatch.setattr(getpass, "getuser", lambda: "1024")
    say("a width of 1024")(release)
    sums_again(release)
    assert problems(release) == []


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is not a folder"):
        require_clean(tmp_path / "none")


def test_a_breach_stops_an_export(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pmp_ds.release.export.verify_reload", lambda *_: 0.0)
    monkeypatch.setattr(allow_list, "REQUIRED", allow_list.REQUIRED - {"README.md"})
    weights = write_weights(tmp_path / "weights", llama(True), torch.bfloat16)
    with pytest.raises(UserError, match=r"README.md: not a file of a release"):
        export(weights, tmp_path / "release", tokenizer_dir=tokenizer_dir, card=CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_tokenizer_forgets_where_it_was_trained(tmp_path: Path) -> None:
    import sentencepiece

    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer.model").write_bytes(remembering_model())
    copy_tokenizer(source, target)
    copied = (target / "tokenizer.model").read_bytes()
    assert b"alice" not in copied
    encoded = [
        sentencepiece.SentencePieceProcessor(model_proto=model).encode("some more words")
        for model in (copied, remembering_model())
    ]
    assert encoded[0] == encoded[1]
