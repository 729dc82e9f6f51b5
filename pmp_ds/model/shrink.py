"""Shrink an architecture to tiny width: same classes and switches, some 100,000 parameters.

    small = shrunk(hf_config)

Sizes are recognised by words in their names, at any depth of the config. Other settings keep their
values, so the architecture's switches stay on.
"""

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

VOCAB, POSITIONS = 128, 64
_LAYERS, _MOST_LAYERS, _WIDTH, _HEADS, _HEAD = 2, 8, 64, 4, 16
_KEEP = 1 << 62
# The first pattern that matches a key gives the largest value it may keep.
_LARGEST = (
    (r"token_i(d|ndex)|_ids?$", VOCAB - 1),
    (r"vocab", VOCAB),
    (r"first_k_dense", 1),
    (r"period|offset|interval|freq|every|step|replace|hash|bucket|axial", _KEEP),
    (r"experts_per_tok|num_selected|top_?k$|moe_k$", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"shared_experts?$", _KEEP),
    (r"expert.*(size|dim)|ffn|inner|intermediate", 2 * _WIDTH),
    (r"experts", 4),
    (r"head_?\w*dim|head_size|kv_channels|rotary_dim|d_head$|d_kv|qk_\w*dim|v_dim", _HEAD),
    (r"heads?$|head_num", _HEADS),
    (r"rank$", _HEAD),
    (r"position|seq_len|n_ctx|max_length|context|query_length", POSITIONS),
    (r"window|chunk|block_size|local_attention", _HEAD),
    (r"hidden|embd|embed|d_model|width|dim$|size$", _WIDTH),
)
_SHARED = "num_kv_shared_layers"  # the last layers of gemma3n and gemma4
_COUNTS = re.compile(r"(num_|n_|max_)?(\w+_)?layers?|depth")
_KEY_HEADS = re.compile(r"kv_?heads?$|key_value_heads$|n_head_kv$|query_groups$")
_STATE_HEADS = re.compile(r"(n_)?mamba_(n_|num_)?heads$|n_mamba_heads$|^num_heads$")


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return ``config`` at tiny width; raises what its class raises if that does not fit."""
    return type(config).from_dict(_shrunk(config.to_dict(), None))


def _shrunk(values: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """Shrink ``values``; ``layers`` is that of the config around them, or None."""
    counts = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    own = next((values[key] for key in counts if isinstance(values.get(key), int)), layers)
    kept = _kept_layers(values, own)
    small = {key: _smaller(str(key), value, own, kept) for key, value in values.items()}
    heads = values.get("num_attention_heads", values.get("n_head"))
    for key, value in values.items():
        if _KEY_HEADS.search(str(key)) and isinstance(value, int) and not isinstance(value, bool):
            small[key] = _HEADS if value == heads else min(value, 2)
    if {"qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim"} <= values.keys():
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if isinstance(expand := values.get("mamba_expand", values.get("expand")), int | float):
        state_heads = int(expand * _WIDTH) // _HEAD
        small |= {key: state_heads for key in values if _STATE_HEADS.search(str(key))}
        if values.get("mamba_d_ssm") is not None:
            small |= {"mamba_d_ssm": state_heads * _HEAD, "mamba_d_head": _HEAD}
    if values.get(_SHARED):
        small |= {_SHARED: 1}
    if "attention_hidden_size" in values:  # in zamba2, whose attention reads two streams
        small |= {"attention_hidden_size": 2 * _WIDTH, "attention_head_dim": 2 * _WIDTH // _HEADS}
    return small


def _kept_layers(values: dict[str, Any], layers: int | None) -> int:
    """Return the number of layers to keep: at least one of each type, and one that uses their keys
    and values."""
    kept = _LAYERS
    for value in values.values():
        if isinstance(value, list) and len(value) == layers:
            kept = max([kept, *(value.index(kind) + 1 for kind in value if isinstance(kind, str))])
    kept = min(kept, _MOST_LAYERS)
    return kept + 1 if values.get(_SHARED) and kept < (layers or 0) else kept


def _smaller(key: str, value: Any, layers: int | None, kept: int) -> Any:
    if isinstance(value, dict):
        if key == "per_layer_config":
            return {index: more for index, more in value.items() if int(index) < kept}
        return _shrunk(value, layers)
    if key == "attention_types":  # in gpt_neo: pairs of types and numbers of repetitions
        return [[types, 1] for types, _ in value[:1]]
    if isinstance(value, list):
        return [_smaller(key, item, layers, kept) for item in _cut(value, layers, kept)]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    most = next((most for pattern, most in _LARGEST if re.search(pattern, key)), _KEEP)
    return min(value, kept if _COUNTS.fullmatch(key) else most)


def _cut(value: list[Any], layers: int | None, kept: int) -> Iterator[Any]:
    yield from value[:kept] if len(value) == layers else value
