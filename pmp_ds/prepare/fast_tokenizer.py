"""Load, create, rewrite and save fast tokenizers of `transformers`."""

import os
from pathlib import Path
from typing import Any

from pmp_ds.errors import UserError
from pmp_ds.foreign import read_object
from pmp_ds.model.tokenizer_rules import (
    check_description,
    check_tokenizer,
    panics_are_errors,
)
from pmp_ds.run_dir import write_json

_MOST_BYTES = 1 << 28  # the largest vocabularies have 30 MB
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]")


def load(where: Path) -> Any:
    """Return a fast tokenizer from a folder that ``AutoTokenizer`` reads, or a ``tokenizer.json``.

    Raises UserError when it cannot be read or is not a fast tokenizer.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = where if where.is_dir() else where.parent
    whole = where.is_dir() or (folder / "tokenizer_config.json").exists()
    if whole:
        check_tokenizer(folder)
    else:
        check_description(where, read_object(where, _MOST_BYTES))
    try:
        with panics_are_errors():
            if whole:
                tokenizer = AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False
                )
            else:
                tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(where))
                number = tokenizer.backend_tokenizer.token_to_id
                names = [name for name in _EOS_NAMES if number(name) is not None]
                if len(names) == 1:
                    tokenizer.eos_token = names[0]
            tokenizer.encode("a b")  # some fail only here
    except Exception as error:  # transformers raises anything for a bad folder
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"tokenizer {where} cannot be read: {reason}; name a folder that "
            "AutoTokenizer.from_pretrained reads, or a sentencepiece .model file"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"tokenizer {where} is not a fast tokenizer (it has no tokenizer.json); convert it "
            "with transformers first"
        )
    return tokenizer


def wrap(fast: Any, proto: Any) -> Any:
    """Return the `transformers` tokenizer of a converted sentencepiece model."""
    from transformers import PreTrainedTokenizerFast

    spec = proto.trainer_spec
    names = {
        f"{role}_token": proto.pieces[index].piece
        for role, index in (
            ("unk", spec.unk_id),
            ("bos", spec.bos_id),
            ("eos", spec.eos_id),
            ("pad", spec.pad_id),
        )
        if 0 <= index < len(proto.pieces)
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        clean_up_tokenization_spaces=False,
        add_prefix_space=proto.normalizer_spec.add_dummy_prefix,  # used by llama.cpp's converter
        **names,
    )


def save(tokenizer: Any, folder: Path) -> None:
    """Save under a class name that older versions of `transformers` also know."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    settings = read_object(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, settings)


def without_special(description: dict[str, Any], special: dict[str, int]) -> dict[str, Any]:
    """Return the same tokenizer.json with special tokens renamed to text that cannot occur.

    The ids stay. `encode_special_tokens` is not enough: a Unigram, WordLevel or WordPiece
    vocabulary contains `</s>` as an ordinary entry and finds it in text.
    """
    secret = os.urandom(16).hex()  # a document cannot guess it
    renamed = {token: f"\U0010ffff{secret}:{index}" for token, index in special.items()}
    model = dict(description["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(t, t): index for t, index in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[renamed.get(t, t), score] for t, score in model["vocab"]]
    if model.get("merges"):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if left not in renamed and right not in renamed and left + right not in renamed
        ]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    added = [
        token | {"content": renamed.get(token["content"], token["content"])}
        for token in description["added_tokens"]
    ]
    return description | {"model": model, "added_tokens": added}
