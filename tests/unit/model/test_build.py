"""Architectures by name, and every mistake that a configuration can hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen3ForCausalLM,
)

from pmp_ds.config import ModelConfig
from pmp_ds.errors import UserError
from pmp_ds.model.build import build_model, model_config

TINY: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 64}
QWEN: dict[str, Any] = {
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def hf(
    config: ModelConfig, vocab_size: int = 300, bos_id: int | None = 1, block_size: int = 64
) -> PreTrainedConfig:
    return model_config(
        config, vocab_size=vocab_size, eos_id=2, bos_id=bos_id, block_size=block_size
    )


def num_params(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(param.numel() for param in model.parameters())


def test_tinyllama_is_the_published_size() -> None:
    config = hf(ModelConfig(num_kv_heads=4, intermediate_size=5632), vocab_size=32000)
    assert num_params(config) == 1_100_048_384


def test_gpt2_small_is_the_published_size() -> None:
    config = ModelConfig(
        family="gpt2",
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        max_positions=1024,
        tie_embeddings=True,
    )
    assert num_params(hf(config, vocab_size=50257)) == 124_439_808


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied: bool) -> None:
    config = hf(ModelConfig(**TINY, rope_theta=5e5, tie_embeddings=tied), bos_id=None)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rope_parameters["rope_theta"] == 5e5
    assert (config.bos_token_id, config.eos_token_id) == (None, 2)
    assert config.num_key_value_heads == 4
    model = build_model(config)
    assert isinstance(model, LlamaForCausalLM)
    assert model.lm_head.weight.shape == (300, 32)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (128, 32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert model.model.norm.variance_epsilon == 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_gpt2_has_no_dropout(tied: bool) -> None:
    config = hf(ModelConfig(family="gpt2", **TINY, intermediate_size=48, tie_embeddings=tied))
    model = build_model(config).train()
    assert isinstance(model, GPT2LMHeadModel)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (32, 48)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


def test_vocab_size_may_be_larger_than_the_tokenizer() -> None:
    assert hf(ModelConfig(**TINY, vocab_size=320)).vocab_size == 320
    with pytest.raises(UserError, match=r"model.vocab_size=299 is smaller than .* 300 tokens"):
        hf(ModelConfig(**TINY, vocab_size=299))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(hidden_size=12, num_heads=4), "12 / model.num_heads=4 = 3 is odd"),
        (ModelConfig(family="gpt2", **TINY, num_kv_heads=2), "num_kv_heads=2 does not fit"),
        (ModelConfig(**TINY | {"max_positions": 32}), r"block_size=64 .*model.max_positions=32"),
    ],
)
def test_mistakes(config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hf(config)


@pytest.mark.parametrize("as_folder", [True, False])
def test_auto_reads_a_local_config(as_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN))
    config = hf(ModelConfig(family="auto", path=str(tmp_path if as_folder else path)))
    assert (config.vocab_size, config.eos_token_id) == (300, 2)
    model = build_model(config)
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the file .*config.json does not exist.*nothing is downloaded"),
        ("{", "is not a Hugging Face config.json"),
        ("[1]", "is not a Hugging Face config.json"),
        ('{"vocab_size": 9}', "is not a Hugging Face config.json"),
        ('{"model_type": "t5"}', "'t5' is not a causal language model"),
        ('{"model_type": "marian", "decoder_vocab_size": 9}', "decoder_vocab_size=9 is smaller"),
        ('{"model_type": "inkling2_text", "unpadded_vocab_size": 9}', "vocab_size=9 is smaller"),
        ('{"model_type": "gemma3"}', "'gemma3' reads more than text: name .* its text_config"),
        ('{"model_type": "my-own"}', "its own code .*my-own"),
        (json.dumps(QWEN | {"auto_map": {"AutoConfig": "x.Y"}}), "its own code"),
        (json.dumps(QWEN | {"num_hidden_layers": "many"}), "is not accepted by Qwen3Config"),
        (json.dumps(QWEN | {"max_position_embeddings": 63}), "block_size=64 .*=63"),
    ],
)
def test_auto_mistakes(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        hf(ModelConfig(family="auto", path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["cwm", "modernbert-decoder"])
def test_auto_of_a_class_that_takes_no_absent_bos(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "pad_token_id": 0}))
    config = hf(ModelConfig(family="auto", path=str(tmp_path)), bos_id=None)
    assert config.bos_token_id == config.eos_token_id == 2


def test_auto_refuses_settings_without_effect(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    with pytest.raises(UserError, match=r"model.num_layers=3 has no effect"):
        hf(ModelConfig(family="auto", path=str(tmp_path), num_layers=3))
