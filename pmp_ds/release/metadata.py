"""The small files of a release, each key and file by allow-list: what is not named stays behind."""

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from pmp_ds.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_VOCABULARIES = TOKENIZER_FILES[:2]
# Where a tokenizer was once read from: of no use elsewhere, and it names somebody's folders.
_TOKENIZER_PRIVATE = {
    "auto_map",
    "cache_dir",
    "local_files_only",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "vocab_file",
}


def release_config(config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """config.json: the fields that the architecture itself declares, and how to load it.

    Raises UserError when a value looks like a path.
    """
    own = {field.name for field in fields(type(config))}
    own -= {field.name for field in fields(PreTrainedConfig)}
    values = {key: value for key, value in config.to_dict().items() if key in own}
    values = _without_private(values)
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


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files into ``target``; raises UserError when there is no vocabulary."""
    if not any((source / name).is_file() for name in _VOCABULARIES):
        raise UserError(f"{source} holds no tokenizer: one of {', '.join(_VOCABULARIES)} is needed")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    settings = target / "tokenizer_config.json"
    if settings.is_file():
        values = json.loads(settings.read_text(encoding="utf-8"))
        values = {k: v for k, v in _without_private(values).items() if k not in _TOKENIZER_PRIVATE}
        for key, value in values.items():
            if isinstance(value, str) and value.count(os.sep) > 1 and os.path.isabs(value):
                raise UserError(f"{source / settings.name}: {key} is a local path: remove it")
        settings.write_text(as_json(values), encoding="utf-8")


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


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
