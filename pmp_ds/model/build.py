"""Build an untrained Hugging Face model on the CPU from the configuration.

hf = model_config(config.model, vocab_size=..., eos_id=..., bos_id=..., block_size=...)
model = build_model(hf)
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from pmp_ds.config import ModelConfig
from pmp_ds.errors import UserError
from pmp_ds.foreign import read_object
from pmp_ds.model import experts  # noqa: F401 - experts of any width compute
from pmp_ds.model.folder import read_config

_NORM_EPS = 1e-5
# Sizes of tables that are looked up by token or cut to the vocabulary.
_TABLES = ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size")


def model_config(
    config: ModelConfig,
    *,
    vocab_size: int,
    eos_id: int,
    bos_id: int | None,
    block_size: int,
    base: Path | None = None,
) -> PreTrainedConfig:
    """Return the Hugging Face config of ``config.family``.

    ``vocab_size``, ``eos_id`` and ``bos_id`` come from the tokenizer, ``block_size`` (tokens) from
    the data. ``base``: the untrusted folder whose config.json describes an `auto` without a path.
    Raises UserError when they do not fit the model, or when the file of `auto` is not usable.
    """
    rows = config.vocab_size if config.vocab_size is not None else vocab_size
    if rows < vocab_size:
        raise UserError(
            f"model.vocab_size={rows} is smaller than the tokenizer's {vocab_size} tokens: raise "
            "it, or leave it unset"
        )
    tokens = {"vocab_size": rows, "bos_token_id": bos_id, "eos_token_id": eos_id}
    if config.family == "llama":
        hf_config = _llama(config, tokens)
    elif config.family == "gpt2":
        hf_config = _gpt2(config, tokens)
    else:
        if config.path is None and base is not None:
            read_config(base)  # its rules for strangers' files
        hf_config = _auto(config, tokens, base)
    longest = context_length(hf_config)
    if block_size > longest:
        where = (
            "model.max_positions" if config.family != "auto" else f"that of {config.path or base}"
        )
        raise UserError(
            f"the data's block_size={block_size} exceeds the model's longest context "
            f"({where}={longest}): raise the context, or prepare the data with shorter blocks"
        )
    hf_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)].__name__]
    return hf_config


def _require_vocabularies(path: Path, values: dict[str, Any], rows: int) -> None:
    """Raise UserError if a second token table is smaller than the first."""
    for key, value in values.items():
        if isinstance(value, dict):
            _require_vocabularies(path, value, rows)
        elif key in _TABLES and isinstance(value, int) and 0 < value < rows:
            raise UserError(
                f"{path}: {key}={value} is smaller than the vocabulary of {rows} tokens: raise it"
            )


def _kind(config_class: type[PreTrainedConfig], name: str) -> Any:
    """Return the declared type of a setting, or None."""
    return next((f.type for f in fields(config_class) if f.name == name), None)


UNBOUNDED = 1 << 30  # tokens
_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "context_length",
    "n_ctx",
)


def context_length(hf_config: PreTrainedConfig) -> int:
    """Return the longest context in tokens, or ``UNBOUNDED`` for a family without a limit."""
    found = (getattr(hf_config, name, None) for name in _CONTEXT)
    return next((n for n in found if isinstance(n, int) and n > 0), UNBOUNDED)


def build_model(hf_config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model with `transformers`' own initial weights from torch's generator: CPU, fp32."""
    assert not is_deepspeed_zero3_enabled(), "build the model before HfDeepSpeedConfig exists"
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model


def _llama(config: ModelConfig, tokens: dict[str, Any]) -> PreTrainedConfig:
    head_dim = config.hidden_size // config.num_heads
    if head_dim % 2:
        raise UserError(
            f"model.hidden_size={config.hidden_size} / model.num_heads={config.num_heads} = "
            f"{head_dim} is odd, but the rotary embedding needs an even head size: change either"
        )
    return LlamaConfig(
        **tokens,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size or 4 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads or config.num_heads,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=_NORM_EPS,
        tie_word_embeddings=config.tie_embeddings,
    )


def _gpt2(config: ModelConfig, tokens: dict[str, Any]) -> PreTrainedConfig:
    if config.num_kv_heads not in (None, config.num_heads):
        raise UserError(
            f"model.num_kv_heads={config.num_kv_heads} does not fit model.family='gpt2', in which "
            "each head has its own keys and values: leave it unset, or choose 'llama'"
        )
    return GPT2Config(
        **tokens,
        n_embd=config.hidden_size,
        n_inner=config.intermediate_size or 4 * config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_positions=config.max_positions,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        layer_norm_epsilon=_NORM_EPS,
        tie_word_embeddings=config.tie_embeddings,
    )


def _auto(config: ModelConfig, tokens: dict[str, Any], base: Path | None) -> PreTrainedConfig:
    """Read a JSON file without looking anything up by name, so nothing is downloaded."""
    given = config.path or base
    assert given is not None
    default = ModelConfig()
    for field in fields(ModelConfig):
        if field.name in ("family", "path", "vocab_size"):
            continue
        value = getattr(config, field.name)
        if value != getattr(default, field.name):
            raise UserError(
                f"model.{field.name}={value} has no effect with model.family='auto': set it in "
                f"{given}, or leave it unset"
            )
    path = Path(given)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UserError(
            f"model.path={config.path!r}: the file {path} does not exist. Name a local folder with "
            "a config.json, or the file; nothing is downloaded"
        )
    try:
        values = read_object(path)
        model_type = values.pop("model_type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a Hugging Face config.json (a JSON object with a model_type): {error!r}"
        ) from error
    if "auto_map" in values or model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{path} describes a model with its own code (model_type={model_type!r}); only "
            "architectures that are part of transformers can be trained here"
        )
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{path}: model_type={model_type!r} is not a causal language model")
    values.pop("dtype", None)
    values.pop("torch_dtype", None)
    if tokens["bos_token_id"] is None and _kind(config_class, "bos_token_id") is int:
        tokens["bos_token_id"] = tokens["eos_token_id"]  # None is not accepted; GPT-2's are equal
    try:
        hf_config = config_class(**{**values, **tokens})
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not accepted by {config_class.__name__}: {reason}") from error
    assert isinstance(hf_config, PreTrainedConfig)
    if hf_config.get_text_config() is not hf_config:
        raise UserError(
            f"{path}: model_type={model_type!r} reads more than text: name a file with only its "
            "text_config, or another text model"
        )
    _require_vocabularies(path, hf_config.to_dict(), tokens["vocab_size"])
    return hf_config
