"""Models that could not be released are refused before training; the others are released whole."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaModel

from pmp_ds.errors import UserError
from pmp_ds.model.build import build_model
from pmp_ds.model.parameters import constants
from pmp_ds.model.shrink import shrunk
from pmp_ds.release import rehearsal, verify
from pmp_ds.release.architecture import kept, strangers
from pmp_ds.release.export import export, write_model
from pmp_ds.release.rehearsal import rehearse
from pmp_ds.release.reload import compute
from pmp_ds.release.source import open_source
from pmp_ds.state.weight_files import load_weights, save_all
from tests.helpers.faults import seen
from tests.unit.release.conftest import CARD, llama

MOE = {"num_experts": 4, "head_dim": 24}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def small(kind: str, **settings: Any) -> PreTrainedConfig:
    config = shrunk(CONFIG_MAPPING[kind](**settings))
    config.eos_token_id, config.bos_token_id, config.pad_token_id = 0, None, None
    return config


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3_moe", MOE),
        ("deepseek_v3", {}),
        ("glm4_moe", {}),
        ("gpt_neox", {}),
        ("bloom", {}),
        ("mpt", {}),
        ("gpt2", {}),
        ("llama", {"eos_token_id": [1, 2]}),
        ("bert", {"is_decoder": True}),
    ],
)
def test_families_that_can_be_released(kind: str, settings: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    rehearse(CONFIG_MAPPING[kind](**settings))
    assert torch.equal(torch.get_rng_state(), state)  # training draws as before


def test_what_transformers_keeps_in_fp32_is_compared_in_fp32(tmp_path: Path) -> None:
    """Its norms compute in fp32 in a bf16 release. Rounded, a near tie between two experts goes
    the other way, and the logits are far apart."""
    model = build_model(small("deepseek_v4"))
    rehearsal._sharpen(model)
    for param in model.parameters():
        if param.ndim == 1:
            nn.init.normal_(param, mean=1.0, std=0.1)
    save_all(dict(model.named_parameters()) | constants(model), model.config, tmp_path)
    folder = tmp_path / "release"
    folder.mkdir()
    input_ids = verify.probe(model.config)
    with closing(open_source(tmp_path)) as source:
        write_model(source, folder, "bf16", 1 << 40, quiet=True)
        logits, problems, dtype, wide = compute(str(folder), input_ids)
        wanted = verify.reference_logits(source, input_ids, torch.bfloat16, wide)
        rounded = verify.reference_logits(source, input_ids, torch.bfloat16, [])
    assert (problems, dtype) == ({}, "torch.bfloat16")
    assert wide
    assert torch.equal(logits, wanted)
    assert not torch.equal(logits, rounded)


@pytest.mark.parametrize("kind", ["falcon_h1", "zamba2", "gemma3n_text"])
def test_sizes_that_follow_from_others_are_shrunk_with_them(kind: str) -> None:
    rehearse(small(kind), secret=False)


def test_a_model_that_reads_both_ways_is_refused_with_the_way_out() -> None:
    words = r'reads in both .* a causal model: add "is_decoder": true to its config\.json$'
    with pytest.raises(UserError, match=f"^model_type='bert' is not trained: it {words}"):
        rehearse(CONFIG_MAPPING["bert"]())


def test_a_model_that_needs_more_than_text_is_refused() -> None:
    config = CONFIG_MAPPING["dbrx"]()
    with pytest.raises(UserError, match=r"^model_type='dbrx' is not trained: "):
        rehearse(config)


def test_initial_weights_that_no_key_reproduces_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr("transformers.LlamaForCausalLM._init_weights", lambda self, module: None)
    rehearse(llama(False), secret=False)
    with pytest.raises(UserError) as caught:
        rehearse(llama(False))
    seen("no initial weights", 1, f"error: {caught.value}")


def test_a_buffer_that_training_changes_is_refused(monkeypatch: Any) -> None:
    original = LlamaModel.__init__, LlamaModel.forward

    def init(self: Any, config: Any) -> None:
        original[0](self, config)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen += self.training
        return original[1](self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "__init__", init)
    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(UserError, match="which neither gradients") as caught:
        rehearse(llama(False))
    seen("changing buffer", 1, f"error: {caught.value}")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("intermediate_size", r"would describe another architecture \(model\..*weight"),
        ("rope_parameters", r"its release would not be the model: the release's logits differ by"),
    ],
)
def test_what_a_release_forgets_is_found(monkeypatch: Any, key: str, message: str) -> None:
    """An export rule is too narrow, by shape and by value."""

    def forgetful(config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
        full = kept(config) | {"dtype": dtype, "model_type": config.model_type}
        return {name: value for name, value in full.items() if name != key}

    for module in ("rehearsal", "export"):
        monkeypatch.setattr(f"pmp_ds.release.{module}.release_config", forgetful)
    with pytest.raises(UserError, match=message) as caught:
        rehearse(llama(False))
    seen("not its release", 1, f"error: {caught.value}")


def test_a_large_model_that_does_not_shrink_is_compared_by_its_shapes(monkeypatch: Any) -> None:
    def fail(config: PreTrainedConfig) -> Any:
        raise ValueError("does not fit")

    monkeypatch.setattr(rehearsal, "shrunk", fail)
    monkeypatch.setattr(rehearsal, "_SMALL", 10)
    rehearse(CONFIG_MAPPING["qwen3_moe"](**MOE))


def test_keys_of_an_architecture() -> None:
    """Those its class declares, under both of their names, and numbers that its code reads."""
    config = CONFIG_MAPPING["qwen3_moe"](
        **MOE, comment="by Alice", seed=42, pmp_density=0.7, head_size="/home/alice"
    )
    found = kept(config)
    assert (found["head_dim"], found["num_local_experts"]) == (24, 4)
    assert not found.keys() & {"comment", "seed", "pmp_density", "head_size", "_name_or_path"}
    text = CONFIG_MAPPING["qwen3_moe"](head_dim=24).to_dict() | {"head_dim": "a text"}
    assert "head_dim" in set(strangers(CONFIG_MAPPING["qwen3_moe"], text))


def test_keys_of_a_config_inside_a_config() -> None:
    config = CONFIG_MAPPING["gemma3"](text_config={"head_dim": 24, "comment": "by Alice"})
    assert "text_config.comment" in set(strangers(type(config), config.to_dict()))
    inner = kept(config)["text_config"]
    assert inner["head_dim"] == 24
    assert "comment" not in inner
    assert not list(strangers(type(config), kept(config)))


@pytest.mark.usefixtures("no_reload")
def test_constants_are_released(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Kept by checkpoints and releases in their own dtype, and read back as they were."""
    model = build_model(small("deepseek_v3", first_k_dense_replace=1))
    bias = torch.arange(4.0) / 3  # not a bf16 number
    constants(model)[BIAS].copy_(bias)
    assert not isinstance(model.get_buffer(BIAS), nn.Parameter)
    weights = tmp_path / "weights"
    weights.mkdir()
    tensors = {name: param.detach().bfloat16() for name, param in model.named_parameters()}
    save_all(tensors | constants(model), model.config, weights)
    resumed = build_model(model.config)
    load_weights(weights, resumed)
    assert torch.equal(resumed.get_buffer(BIAS), bias)

    summary = export(weights, tmp_path / "release", tokenizer_dir=tokenizer_dir, card=CARD)
    assert summary.num_params == sum(param.numel() for param in model.parameters())
    stored = load_file(tmp_path / "release" / "model.safetensors")
    assert summary.total_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert torch.equal(stored[BIAS], bias)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "release", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert torch.equal(loaded.get_buffer(BIAS).float(), bias)


@pytest.mark.usefixtures("no_reload")
def test_an_old_checkpoint_without_constants_resumes_and_names_them(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    model = build_model(small("deepseek_v3", first_k_dense_replace=1))
    weights = tmp_path / "weights"
    weights.mkdir()
    params = {name: param.detach() for name, param in model.named_parameters()}
    save_all(params, model.config, weights)
    load_weights(weights, build_model(model.config))
    with pytest.raises(UserError, match=rf"lacks {BIAS}"):
        export(weights, tmp_path / "release", tokenizer_dir=tokenizer_dir, card=CARD)


def test_a_config_key_that_only_code_reads_passes_the_check(tmp_path: Path) -> None:
    from pmp_ds.release.allow_list import _about_config

    config = kept(CONFIG_MAPPING["qwen3_moe"](**MOE)) | {"model_type": "qwen3_moe"}
    assert not list(_about_config(json.loads(json.dumps(config))))
    assert list(_about_config(config | {"comment": "x"})) == [
        "config.json: the key 'comment' is not on the list"
    ]
