"""config.json under the names of transformers 4 too: by hand, and every family reloaded."""

import copy
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from pmp_ds.release.architecture import kept
from pmp_ds.release.metadata import release_config
from pmp_ds.release.older_names import older_names

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LONG = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}
LOCAL = {"rope_type": "default", "rope_theta": 10.0}


@pytest.mark.parametrize(
    ("model_type", "values", "older"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": 5e5},
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        ("llama", {"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        (
            "phi",
            {"rope_parameters": LOCAL | {"partial_rotary_factor": 0.5}},
            {"rope_theta": 10.0, "partial_rotary_factor": 0.5},
        ),
        (
            "gpt_neox",
            {"rope_parameters": LINEAR | {"rope_theta": 9.0, "partial_rotary_factor": 1.0}},
            {
                "rope_theta": 9.0,
                "rotary_emb_base": 9.0,
                "partial_rotary_factor": 1.0,
                "rotary_pct": 1.0,
                "rope_scaling": LINEAR,
            },
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "sliding_attention": LOCAL,
                    "full_attention": LINEAR | {"rope_theta": 8.0},
                }
            },
            {"rope_theta": 8.0, "rope_local_base_freq": 10.0, "rope_scaling": LINEAR},
        ),
        (
            "olmo",
            {"rope_parameters": LINEAR | {"rope_theta": 9.0}},
            {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        (
            "phi3",
            {
                "rope_parameters": LONG
                | {
                    "rope_type": "longrope",
                    "rope_theta": 9.0,
                    "original_max_position_embeddings": 64,
                },
                "original_max_position_embeddings": 64,
            },
            {"rope_theta": 9.0, "rope_scaling": {"type": "longrope"} | LONG},
        ),
        ("gpt2", {"n_positions": 12}, {"n_ctx": 12}),
        ("qwen3_moe", {"num_local_experts": 4}, {"num_experts": 4}),
        ("gpt2", {"rope_parameters": "nonsense"}, {}),
    ],
)
def test_by_hand(model_type: str, values: dict[str, Any], older: dict[str, Any]) -> None:
    assert older_names(model_type, values) == older


def changed(config: PreTrainedConfig, scaled: bool) -> PreTrainedConfig:
    """Give every base of the rotary embedding its own number, so that none can stand for
    another; ``scaled``: scale full attention."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {kind: part for kind, part in rope.items() if isinstance(part, dict)}
    for number, part in enumerate(kinds.values() if kinds else [rope]):
        if "rope_theta" in part:
            part["rope_theta"] = 5000.0 + number
    full = kinds.get("full_attention", {}) if kinds else rope
    if scaled and full.get("rope_type") == "default":
        full.update(LINEAR)
    return config


@pytest.mark.parametrize("scaled", [False, True])
def test_every_family_reads_the_same_config(scaled: bool) -> None:
    """To the version installed here, both names together mean the same as the newer ones alone."""
    seen = 0
    for kind in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[kind]
        if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
            continue
        try:
            config = changed(config_class(), scaled)
            released = release_config(config, "bfloat16")
            older = older_names(kind, config.to_dict() | {"dtype": "bfloat16"})
            newer = {key: released[key] for key in released.keys() - (older.keys() - kept(config))}
            alone = config_class.from_dict(copy.deepcopy(newer)).to_dict()
        except Exception:  # noqa: BLE001 - a family that refuses its own defaults, or this scaling
            continue
        both = config_class.from_dict(copy.deepcopy(released)).to_dict()
        if kind in ("olmo", "olmo2", "phi3") or "hunyuan" in kind or "phi4" in kind:
            both.get("rope_parameters", {}).pop("type", None)  # equal to rope_type
        assert {key: both[key] for key in alone} == alone, kind
        seen += 1
    assert seen > 150
