"""A tokenizer's files for a release: the vocabulary unchanged, settings by allow-list."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

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
    "added_tokens",
    "decoder",
    "model",
    "normalizer",
    "padding",
    "post_processor",
    "pre_tokenizer",
    "truncation",
    "version",
}
# Settings that `transformers` writes and reads, without the path of the original tokenizer.
TOKENIZER_KEYS = {
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "added_tokens_decoder",
    "additional_special_tokens",
    "backend",
    "bos_token",
    "byte_fallback",
    "chat_template",
    "clean_up_tokenization_spaces",
    "cls_token",
    "do_lower_case",
    "eos_token",
    "errors",
    "extra_special_tokens",
    "legacy",
    "lstrip",
    "mask_token",
    "model_input_names",
    "model_max_length",
    "model_specific_special_tokens",
    "normalized",
    "pad_token",
    "padding_side",
    "processor_class",
    "rstrip",
    "sep_token",
    "single_word",
    "sp_model_kwargs",
    "spaces_between_special_tokens",
    "special",
    "split_special_tokens",
    "strip_accents",
    "tokenize_chinese_chars",
    "tokenizer_class",
    "trim_offsets",
    "truncation_side",
    "unk_token",
    "use_default_system_prompt",
    "vocab_type",
}
_TRAINER_PATHS = ("input", "model_prefix")  # in sentencepiece's trainer_spec


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files into ``target``. Raises UserError when there is no vocabulary.

    A `.model` loses the names of its training files; its pieces stay.
    """
    if not any((source / name).is_file() for name in _VOCABULARIES):
        raise UserError(f"{source} has no tokenizer: one of {', '.join(_VOCABULARIES)} is needed")
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


def settle_tokenizer(
    folder: Path, tokens: Mapping[str, int | None], *, leading_bos: bool | None, context: int | None
) -> int | None:
    """Adapt the copied tokenizer's settings to the model's config, as clients expect them.

    ``tokens``: the ids of the model's ``bos`` and ``eos``. ``leading_bos``: whether begin of text
    starts every document in training; None keeps the tokenizer's setting. ``context``: the longest
    input. Returns the id of the padding, which is end of text if there is no other.
    """
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # token_type_ids stop generate
    settings.pop("model_max_length", None)
    if context is not None:
        settings["model_max_length"] = context
    if isinstance(extra := settings.get("extra_special_tokens"), list):  # 4 wants a dictionary
        del settings["extra_special_tokens"]
        if extra:
            settings["additional_special_tokens"] = extra
    if leading_bos is not None:
        settings["add_bos_token"] = leading_bos
    pad = tokens["eos"]
    if (folder / "tokenizer.json").is_file():
        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for role, number in tokens.items():
            if number is not None and (text := fast.id_to_token(number)) is not None:
                settings[f"{role}_token"] = text
        for role in ("unk", "pad"):
            if _number(fast, settings.get(f"{role}_token")) is None and "eos_token" in settings:
                settings[f"{role}_token"] = settings["eos_token"]
        if (found := _number(fast, settings.get("pad_token"))) is not None:
            pad = found
        if leading_bos is not None:
            _lead(fast, tokens["bos"] if leading_bos else None, folder / "tokenizer.json")
    path.write_text(as_json(settings), encoding="utf-8")
    _repeat(settings, folder / "special_tokens_map.json")
    return pad


def _number(fast: Tokenizer, token: Any) -> int | None:
    """Return the id of a token as written in tokenizer_config.json, or None."""
    text = token.get("content") if isinstance(token, dict) else token
    found: int | None = fast.token_to_id(text) if isinstance(text, str) else None
    return found


def _lead(fast: Tokenizer, bos: int | None, path: Path) -> None:
    """Make ``fast`` begin a text with ``bos`` and nothing else; write ``path`` if this changes
    it."""
    plain = fast.encode("a", add_special_tokens=False).ids
    if fast.encode("a").ids == ([] if bos is None else [bos]) + plain:
        return
    lead = {} if bos is None else {fast.id_to_token(bos): bos}
    fast.post_processor = TemplateProcessing(
        single=[*lead, "$A"], pair=[*lead, "$A", "$B:1"], special_tokens=list(lead.items())
    )
    fast.save(str(path))


def _repeat(settings: Mapping[str, Any], path: Path) -> None:
    """Repeat settings in special_tokens_map.json, which older versions of transformers prefer."""
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        roles = (f"{role}_token" for role in ("bos", "eos", "unk", "pad"))
        known |= {role: settings[role] for role in roles if role in settings}
        path.write_text(as_json(known), encoding="utf-8")


def trainer_paths(model: bytes) -> list[str]:
    """Return the training files named in a sentencepiece model; none for other formats."""
    proto = _parse(model)
    if proto is None:
        return []
    spec = proto.trainer_spec
    return [text for text in (*spec.input, spec.model_prefix) if text]


def _parse(model: bytes) -> Any:
    """Return sentencepiece's ModelProto, or None if ``model`` is in another format."""
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
