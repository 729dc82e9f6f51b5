"""Names of config.json's keys before version 5 of transformers; a release has both.

transformers 4, and clients that read config.json themselves (llama.cpp, mlx-lm, CTranslate2), know
only the older ones. Without them they silently use a default and compute other logits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING

_EVERY = None
_NEOX = ("gpt_neox", "gpt_neox_japanese")
_GEMMA3 = ("gemma3_text", "gemma3n_text")
_MODERNBERT = ("modernbert-decoder",)
_FULL, _SLIDING = "full_attention", "sliding_attention"

# (older key, kind of layers where kinds differ, key in rope_parameters, model types that know it)
_ROPE = (
    ("rope_theta", _FULL, "rope_theta", _EVERY),
    ("partial_rotary_factor", None, "partial_rotary_factor", _EVERY),
    ("rotary_emb_base", None, "rope_theta", _NEOX),
    ("rotary_pct", None, "partial_rotary_factor", _NEOX),
    ("rope_local_base_freq", _SLIDING, "rope_theta", _GEMMA3),
    ("global_rope_theta", _FULL, "rope_theta", _MODERNBERT),
    ("local_rope_theta", _SLIDING, "rope_theta", _MODERNBERT),
)
_NOT_SCALING = {"rope_theta", "partial_rotary_factor"}
_SCALED = ("linear", "dynamic", "yarn", "longrope", "llama3")
# If kinds of layers differ, version 4 scaled only full attention, and only in these models.
_SCALED_FULL = (*_GEMMA3, "olmo3")
# The configs of version 4 of these models require exactly these fields.
_STRICT = ("olmo", "olmo2", "hunyuan_v1_dense", "hunyuan_v1_moe", "phi3", "phi4_multimodal")
_STRICT_FIELDS = ({"type", "factor"}, {"type", "alpha"}, {"type", "short_factor", "long_factor"})
# Read by other clients, never by transformers: (key, model type, key with the same value).
_OTHERS = (("n_ctx", "gpt2", "n_positions"),)


def older_names(model_type: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the older keys of ``values``, a version-5 ``to_dict()`` or config.json."""
    found = dict(_of_rope(model_type, values))
    if values.get("dtype") is not None:
        found["torch_dtype"] = values["dtype"]
    found |= {
        key: values[same] for key, kind, same in _OTHERS if kind == model_type and same in values
    }
    # A declared field whose value version 5 stores under another name.
    config_class = CONFIG_MAPPING[model_type]
    renamed = config_class.attribute_map
    declared = {field.name for field in fields(config_class)} & renamed.keys()
    return found | {key: values[renamed[key]] for key in declared if renamed[key] in values}


def _of_rope(model_type: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return
    by_layer = {kind: value for kind, value in rope.items() if isinstance(value, dict)}
    for key, kind, name, known in _ROPE:
        part = by_layer.get(kind, {}) if by_layer else rope
        if (known is _EVERY or model_type in known) and part.get(name) is not None:
            yield key, part[name]
    if by_layer and model_type not in _SCALED_FULL:
        return
    part = by_layer.get(_FULL, {}) if by_layer else rope
    if part.get("rope_type") not in _SCALED:
        return
    scaling = {key: value for key, value in part.items() if key not in _NOT_SCALING}
    if model_type in _STRICT:
        short = {"type": part["rope_type"]} | scaling
        del short["rope_type"]
        if values.get("original_max_position_embeddings") is not None:
            short.pop("original_max_position_embeddings", None)
        if short.keys() in _STRICT_FIELDS:
            scaling = short
    yield "rope_scaling", scaling
