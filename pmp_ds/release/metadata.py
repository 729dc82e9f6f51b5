"""config.json and generation_config.json of a release, filtered by the allow-list."""

import os
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from pmp_ds.errors import UserError
from pmp_ds.model.build import UNBOUNDED, context_length
from pmp_ds.model.experts import PLAIN
from pmp_ds.release.architecture import kept
from pmp_ds.release.older_names import older_names


def release_config(config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """Return config.json: the architecture, and how to load it.

    Keys that were renamed in version 5 of transformers appear under both names. Raises UserError
    when a value looks like a path.
    """
    values = _without_private(kept(config))
    values |= older_names(config.model_type, _without_private(config.to_dict()) | {"dtype": dtype})
    if "bos_token_id" in values:
        values["bos_token_id"] = begin_of_text(config)
    if config._experts_implementation == PLAIN:
        values["experts_implementation"] = PLAIN  # transformers' default may refuse their widths
    _refuse_paths(values, "config.json")
    return values | {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__],
        "dtype": dtype,
        "model_type": config.model_type,
        "transformers_version": transformers.__version__,
    }


def begin_of_text(config: PreTrainedConfig) -> int | None:
    """Return the id before a document in training: begin of text, else the previous end of text.

    CTranslate2 loads no model without one, and lm-eval scores a first token after it.
    """
    found: int | None = getattr(config, "bos_token_id", None)
    return found if found is not None else end_of_text(config)


def end_of_text(config: PreTrainedConfig) -> int | None:
    """Return the id after a document, the first if there are several."""
    eos = getattr(config, "eos_token_id", None)
    found: int | None = eos[0] if isinstance(eos, list) else eos
    return found


def longest_context(config: PreTrainedConfig) -> int | None:
    """Return the longest input in tokens, or None if the architecture sets no limit."""
    found = context_length(config)
    return None if found == UNBOUNDED else found


def generation_config(config: PreTrainedConfig, pad_id: int | None) -> dict[str, Any]:
    """Return generation_config.json: the special tokens, with the tokenizer's ``pad_id``.

    config.json does not contain ``pad_id``: there it would keep that token's embedding from
    learning.
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
