"""A tokenizer's files for a release: the vocabulary as it is, settings by allow-list."""

import json
import shutil
from pathlib import Path
from typing import Any

from pmp_ds.errors import UserError
from pmp_ds.foreign import read_bytes, read_object

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_VOCABULARIES = TOKENIZER_FILES[:2]
TOKENIZER_JSON_KEYS = {
    "added_tokens", "decoder", "model", "normalizer", "padding", "post_processor",
    "pre_tokenizer", "truncation", "version",
}  # fmt: skip
# What `transformers` writes and reads. Where a tokenizer was once read from is not among them.
TOKENIZER_KEYS = {
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder",
    "additional_special_tokens", "backend", "bos_token", "byte_fallback", "chat_template",
    "clean_up_tokenization_spaces", "cls_token", "do_lower_case", "eos_token", "errors",
    "extra_special_tokens", "legacy", "lstrip", "mask_token", "model_input_names",
    "model_max_length", "model_specific_special_tokens", "normalized", "pad_token",
    "padding_side", "processor_class", "rstrip", "sep_token", "single_word",
    "sp_model_kwargs", "spaces_between_special_tokens", "special", "split_special_tokens",
    "strip_accents", "tokenize_chinese_chars", "tokenizer_class", "trim_offsets",
    "truncation_side", "unk_token", "use_default_system_prompt", "vocab_type",
}  # fmt: skip
_TRAINER_PATHS = ("input", "model_prefix")  # of sentencepiece's trainer_spec


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files into ``target``; raises UserError when there is no vocabulary.

    A `.model` forgets the files it was trained on; its pieces stay as they are.
    """
    if not any((source / name).is_file() for name in _VOCABULARIES):
        raise UserError(f"{source} holds no tokenizer: one of {', '.join(_VOCABULARIES)} is needed")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    settings = target / "tokenizer_config.json"
    if settings.is_file():
        values = read_object(settings)
        kept = {key: value for key, value in values.items() if key in TOKENIZER_KEYS}
        settings.write_text(as_json(kept), encoding="utf-8")
    model = target / "tokenizer.model"
    if model.is_file() and list(trainer_paths(content := read_bytes(model))):
        proto = _parse(content)
        for field in _TRAINER_PATHS:
            proto.trainer_spec.ClearField(field)
        model.write_bytes(proto.SerializeToString(deterministic=True))


def trainer_paths(model: bytes) -> list[str]:
    """The files that a sentencepiece model remembers of its training; none of another format."""
    proto = _parse(model)
    if proto is None:
        return []
    spec = proto.trainer_spec
    return [text for text in (*spec.input, spec.model_prefix) if text]


def _parse(model: bytes) -> Any:
    """sentencepiece's ModelProto; None when ``model`` is in another format."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError:
        return None
    return proto


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
