"""Tiny weights as in a checkpoint, a tokenizer, and the facts of a card."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from pmp_ds.model.build import build_model
from pmp_ds.release import export as export_module
from pmp_ds.release.model_card import CardFacts

CARD = CardFacts(
    name="tiny",
    secrecy="secret",
    tokens=1_638_400,
    updates=200,
    global_batch_size=32,
    block_size=256,
    schedule="AdamW, peak 2e-5, cosine",
    val_loss=2.5,
    dataset_sources=("DKYoon/SlimPajama-6B", "/home/alice/secret-client/corpus.jsonl"),
    data_description="English web text.",
    date="2026-01-31",
)


def llama(tied: bool) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
    )


def gpt2() -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=12,
        bos_token_id=None,
        eos_token_id=0,
    )


def write_weights(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, shards: int = 1
) -> Path:
    """Write the weights of a checkpoint: named_parameters() in one or more files, 0600, and
    config.json."""
    folder.mkdir()
    torch.manual_seed(1)
    model = build_model(config)
    tensors = {
        name: torch.randn_like(param).mul_(0.05).add_(param.detach()).to(dtype)
        for name, param in model.named_parameters()
    }
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        file = file if shards > 1 else "model.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"private": "yes"})
        (folder / file).chmod(0o600)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    private = {"_name_or_path": "/home/alice/run", "pmp_density": 0.7, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | private))
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    characters = "abcdefghijklmnopqrstuvwxyz 0123456789'.,:!"
    vocab = {"</s>": 0, "?": 1} | {c: i for i, c in enumerate(characters, start=2)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="?")
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"name_or_path": "/home/alice/tokenizer"}
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "notes.txt").write_text("private")
    return folder


@pytest.fixture
def no_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the fresh process, which takes seconds, where it is not the point."""
    monkeypatch.setattr(export_module, "verify_reload", lambda *_: 0.0)
