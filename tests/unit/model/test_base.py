"""theta(0) from a folder: its slices are its tensors; another model, and what cannot be trusted, is
refused in one line."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedConfig

from pmp_ds.errors import UserError
from pmp_ds.model.base import open_base
from pmp_ds.model.build import build_model, model_config
from pmp_ds.model.initial import Initial, digest_of
from pmp_ds.model.keys import Secret
from pmp_ds.model.parameters import constants
from tests.helpers import families, tiny
from tests.unit.model.test_folder import index, tensors

KEY = Secret(b"k" * 32)
NORM = "model.norm.weight"


def ours(**changes: object) -> PreTrainedConfig:
    config = model_config(
        tiny.LLAMA, vocab_size=tiny.VOCAB, eos_id=2, bos_id=None, block_size=tiny.BLOCK
    )
    return LlamaConfig(**config.to_dict() | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of bf16 weights in shards."""
    path = tmp_path / "base"
    tiny.model().to(torch.bfloat16).save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def single(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    tiny.model().save_pretrained(path)
    return path


def test_any_slice_is_that_of_the_tensor(folder: Path) -> None:
    initial = Initial(ours(), KEY, open_base(folder, ours()))
    assert initial.reason is None
    for name, param in tiny.model().named_parameters():
        whole = param.detach().to(torch.bfloat16).float().reshape(-1)
        for start, count in ((0, len(whole)), (0, 1), (7, 20), (len(whole) - 5, 5), (3, 0)):
            found = initial.read(name, start, count)
            assert found.dtype == torch.float32
            assert torch.equal(found, whole[start : start + count]), (name, start, count)
    assert all(param.is_meta for param in initial.model().parameters())


def test_its_digest_is_shared_by_any_number_of_ranks(folder: Path) -> None:
    initial = Initial(ours(), KEY, open_base(folder, ours()))
    parts = [digest_of([initial.chunk_digests((r, n)) for r in range(n)]) for n in (1, 2, 3)]
    assert len(set(parts)) == 1
    assert parts[0] != digest_of([Initial(ours(), KEY).chunk_digests()])  # not rounded to bf16


def test_vectors_and_equal_elements_count_as_constant(single: Path) -> None:
    """An element of a norm that is still 1 shows that it never moved."""

    def change(content: dict[str, torch.Tensor]) -> None:
        content[NORM] = torch.rand(32)
        content["lm_head.weight"] = torch.full((tiny.VOCAB, 32), 0.5)
        content["model.embed_tokens.weight"][:-1] = 0.25  # not all of it

    tensors(change)(single)
    table = Initial(ours(), KEY, open_base(single, ours())).table
    constant = {info.name for info in table if info.constant}
    assert constant == {i.name for i in table if len(i.shape) == 1} | {"lm_head.weight"}


def random_folder(folder: Path, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Write random parameters and persistent buffers, and return them by name."""
    model = build_model(config)
    named = {name: param.detach() for name, param in model.named_parameters()} | constants(model)
    named = {name: torch.rand(tensor.shape) for name, tensor in named.items()}
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(named, folder / "model.safetensors")
    return named


@pytest.mark.parametrize("kind", ["deepseek_v3", "ernie4_5_moe"])
def test_buffers_and_frozen_parameters(kind: str, tmp_path: Path) -> None:
    config = families.tiny_config(kind)
    named = random_folder(tmp_path / "base", config)
    initial = Initial(config, KEY, open_base(tmp_path / "base", config))
    for name, value in constants(initial.model()).items():
        assert torch.equal(value, named[name])
    before = digest_of([initial.chunk_digests()])
    outside = sorted(named.keys() - {info.name for info in initial.table})
    assert outside
    tensors(lambda content: content[outside[0]].mul_(2))(tmp_path / "base")
    changed = Initial(config, KEY, open_base(tmp_path / "base", config))
    assert digest_of([changed.chunk_digests()]) != before


def test_a_tied_weight_may_be_there_twice(tmp_path: Path) -> None:
    model = tiny.model(tiny.LLAMA_TIED)
    model.save_pretrained(tmp_path / "base")
    config = model.config
    tensors(lambda c: c.update({"lm_head.weight": c["model.embed_tokens.weight"].clone()}))(
        tmp_path / "base"
    )
    initial = Initial(config, KEY, open_base(tmp_path / "base", config))
    assert "lm_head.weight" not in initial.shapes


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def settings(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickles": (pickled, "has no .safetensors file, and pytorch_model.bin may run code"),
    "code": (settings(auto_map={"AutoModelForCausalLM": "m.M"}), "it brings code of its own"),
    "outside": (index("../outside.safetensors"), "points to '../outside.safetensors'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "vocabulary": (settings(vocab_size=320), "its vocabulary has 320 rows, the model's 300"),
    "rope": (
        settings(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "config.json has rope_parameters=",
    ),
    "heads": (settings(num_attention_heads=8), "config.json has num_attention_heads=8 (the"),
    "family": (settings(model_type="mistral"), "has model_type='mistral' (the model: 'llama')"),
    "shape": (
        tensors(lambda c: c.update({NORM: torch.ones(31)})),
        f"its tensors are not the model's: {NORM} [31] (the model: [32])",
    ),
    "missing": (tensors(lambda c: c.pop(NORM)), f"{NORM} missing (the model: [32])"),
    "strange": (tensors(lambda c: c.update(extra=torch.ones(2))), "the model has no extra"),
    "integers": (
        tensors(lambda c: c.update({NORM: torch.ones(32, dtype=torch.int8)})),
        f"{NORM} is stored as I8",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused(name: str, single: Path) -> None:
    change, words = REFUSED[name]
    change(single)
    with pytest.raises(UserError) as caught:
        open_base(single, ours())
    text = str(caught.value)
    assert text.startswith(f"init.weights={single}: ")
    assert words in text
    assert "\n" not in text


def test_names_of_a_mixture_of_experts(tmp_path: Path) -> None:
    """By default transformers saves each expert under its older name."""
    config = families.tiny_config("mixtral")
    model = build_model(config)
    model.save_pretrained(tmp_path / "older")
    with pytest.raises(UserError, match=r"missing .*save_pretrained\(FOLDER, save_original_format"):
        open_base(tmp_path / "older", config)
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    base = open_base(tmp_path / "own", config)
    for name, param in model.named_parameters():
        assert torch.equal(base.read(name, 0, param.numel()), param.detach().reshape(-1))


def test_what_does_not_change_the_function_may_differ(single: Path) -> None:
    settings(initializer_range=0.5, eos_token_id=7, use_cache=False, attention_dropout=0.1)(single)
    assert open_base(single, ours()).opened is not None


def test_the_model_may_come_from_the_folder(single: Path) -> None:
    given = partial(
        model_config,
        tiny.ModelConfig(family="auto"),
        vocab_size=tiny.VOCAB,
        eos_id=2,
        bos_id=None,
        block_size=tiny.BLOCK,
        base=single,
    )
    config = given()
    assert open_base(single, config).opened is not None
    settings(auto_map={"AutoModelForCausalLM": "m.M"})(single)
    with pytest.raises(UserError, match="it brings code of its own"):
        given()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, single: Path) -> None:
    tensors(lambda c: c[NORM].__setitem__(3, value))(single)
    initial = Initial(ours(), KEY, open_base(single, ours()))
    with pytest.raises(UserError, match=rf"init\.weights=.*: {NORM} has NaN or infinity"):
        initial.chunk_digests()


def test_without_the_folder_nothing_is_drawn_instead(folder: Path) -> None:
    whole = Initial(ours(), KEY, open_base(folder, ours()))
    shutil.rmtree(folder)
    gone = Initial(ours(), KEY, open_base(folder, ours()))
    assert gone.is_gone
    assert gone.shapes == whole.shapes
    for read in (lambda: gone.read(NORM, 0, 1), gone.chunk_digests):
        with pytest.raises(UserError, match=r"init\.weights=.* does not exist"):
            read()


def test_a_family_that_is_whole_on_every_rank(tmp_path: Path) -> None:
    """Its values are the folder's as well, and no others."""
    config = families.tiny_config("xlstm")
    named = random_folder(tmp_path / "base", config)
    initial = Initial(config, KEY, open_base(tmp_path / "base", config))
    assert initial.reason is not None
    for name, param in initial.model().named_parameters():
        assert torch.equal(param, named[name])
        assert torch.equal(initial.read(name, 0, param.numel()), param.detach().reshape(-1))
