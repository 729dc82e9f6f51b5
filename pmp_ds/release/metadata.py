"""config.json and generation_config.json of a release, each key by allow-list."""

import os
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from pmp_ds.errors import UserError
from pmp_ds.release.architecture import kept


def release_config(config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """config.json: what describes the architecture, and how to load it.

    Raises UserError when a value looks like a path.
    """
    values = _without_private(kept(config))
    _refuse_paths(values, "config.json")
    return values | {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__],
        "dtype": dtype,
        "model_type": config.model_type,
        "transformers_version": transformers.__version__,
    }


def generation_config(config: PreTrainedConfig) -> dict[str, Any]:
    """generation_config.json: the special tokens; padding falls back to the end-of-text token."""
    values = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id")}
    pad = getattr(config, "pad_token_id", None)
    eos = values["eos_token_id"]
    values["pad_token_id"] = pad if pad is not None else eos[0] if isinstance(eos, list) else eos
    values["transformers_version"] = transformers.__version__
    return {key: value for key, value in values.items() if value is not None}


def _without_private(value: Any) -> Any:
    """Drop keys that start with an underscore (`_name_or_path`, `_attn_implementation`)."""
    if isinstance(value, dict):
        return {k: _without_private(v) for k, v in value.items() if not str(k).startswith("_")}
    return value


def _refuse_paths(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_paths(item, f"{where}: {key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_paths(item, where)
    elif isinstance(value, str) and (os.sep in value or value.startswith("~")):
        raise UserError(f"{where} is {value!r}, which looks like a path: remove it from the model")
