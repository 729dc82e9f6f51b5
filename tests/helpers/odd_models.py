"""Architectures whose tensors no number of ranks divides, some with fewer elements than ranks:
norms of 3, biases of 3 experts, and widths that torch's grouped matrix product refuses."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from pmp_ds.model.build import build_model
from pmp_ds.model.keys import Secret
from pmp_ds.model.secret_init import initialize
from tests.helpers import tiny

LLAMA, MIXTRAL, GPT_OSS = KINDS = ("llama", "mixtral", "gpt_oss")
VOCAB, BLOCK, LAYERS, EXPERTS = 301, 16, 2, 3
_OWN: dict[str, dict[str, Any]] = {
    LLAMA: {"hidden_size": 3, "intermediate_size": 5},
    MIXTRAL: {"hidden_size": 6, "intermediate_size": 5},
    GPT_OSS: {"hidden_size": 10, "intermediate_size": 7, "sliding_window": 8},
}


def odd_config(kind: str, **changed: Any) -> PreTrainedConfig:
    """Return the config of a family of ``KINDS``; ``changed`` settings replace the odd ones."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    if kind != LLAMA:
        values |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return CONFIG_MAPPING[kind](**values | _OWN[kind] | changed)


def odd_model(kind: str) -> PreTrainedModel:
    """Return a model of ``KINDS`` at theta(0), fp32 on CPU."""
    model = build_model(odd_config(kind))
    initialize(model, Secret(b"k" * 32))
    return model


def odd_batch(step: int, size: int) -> torch.Tensor:
    """Return (size, BLOCK) int64 of update ``step``."""
    return tiny.batch(step, size)[:, :BLOCK]
