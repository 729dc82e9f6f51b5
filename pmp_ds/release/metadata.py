"""config.json and generation_config.json of a release, each key by allow-list."""

import os
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from pmp_ds.errors import UserError
from pmp_ds.model.build import UNBOUNDED, context_length
from pmp_ds.release.architecture import kept
from pmp_ds.release.older_names import older_names


def release_config(config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """config.json: what describes the architecture, and how to load it.

    Keys that had other names before version 5 of transformers are there under both. Raises
    UserError when a value looks like a path.
    """
    values = _without_private(kept(config))
    values |= older_names(config.model_type, _without_private(config.to_dict()) | {"dtype": dtype})
    if "bos_token_id" in values:
        values["bos_token_id"] = begin_of_text(config)
    _refuse_paths(values, "config.json")
    return values | {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__],
        "dtype": dtype,
        "model_type": config.model_type,
        "transformers_version": transformers.__version__,
    }


def begin_of_text(config: PreTrainedConfig) -> int | None:
    """The id before a document in training: the end of the last one where no other leads it.

    CTranslate2 loads nothing without one, and lm-eval scores a first token after it.
    """
    found: int | None = getattr(config, "bos_token_id", None)
    return found if found is not None else end_of_text(config)


def end_of_text(config: PreTrainedConfig) -> int | None:
    """The id after a document; the first of several."""
    eos = getattr(config, "eos_token_id", None)
    found: int | None = eos[0] if isinstance(eos, list) else eos
    return found


def longest_context(config: PreTrainedConfig) -> int | None:
    """The longest input in tokens; None where the architecture sets no limit."""
    found = context_length(config)
    return None if found == UNBOUNDED else found


def generation_config(config: PreTrainedConfig, pad_id: int | None) -> dict[str, Any]:
    """generation_config.json: the special tokens, with the ``pad_id`` of the tokenizer.

    config.json does not get it: there it would keep the embedding of that token from learning.
    """
    values = {
        "bos_token_id": begin_of_text(config),
        "eos_token_id": getattr(config, "eos_token_id", None),
        "pad_token_id": pad_id,
        "transformers_version": transformers.__version__,
    }
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
