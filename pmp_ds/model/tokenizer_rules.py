"""Rules for a stranger's tokenizer files, checked before `tokenizers` reads them.

Its Rust code trusts its input: an id of 2^31 allocates that much memory, and a character map with a
false length ends the process. Raises UserError that names the file.
"""

import base64
import binascii
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pmp_ds.errors import UserError
from pmp_ds.foreign import read_object

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_MOST_BYTES = 1 << 28  # the largest vocabularies have 30 MB
_MOST_IDS = 1 << 24
_MOST_PADDING = 1 << 20  # tokens
_LONGEST_TEXT = 1 << 10  # characters that a rule adds to every text


@contextlib.contextmanager
def panics_are_errors() -> Iterator[None]:
    """Turn a panic of `tokenizers` into an Exception; by itself it is not one."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from None


def check_tokenizer(folder: Path) -> None:
    """Check the tokenizer files that exist in ``folder``."""
    for name in _FILES:
        path = folder / name
        if not path.exists() and not path.is_symlink():
            continue
        values = read_object(path, _MOST_BYTES)
        if "auto_map" in values:
            raise UserError(f"{path} has auto_map: it brings code of its own")
        length = values.get("model_max_length", 0)
        if not isinstance(length, int | float | None):
            raise UserError(f"{path} is damaged: model_max_length is {length!r:.60}, not a number")
        if name == "tokenizer.json":
            check_description(path, values)


def check_description(path: Path, values: dict[str, Any]) -> None:
    """Check the ``values`` of a tokenizer.json."""
    model, added = values.get("model"), values.get("added_tokens", [])
    if not isinstance(model, dict) or not isinstance(added, list):
        raise UserError(f"{path} is not a tokenizer.json of the library tokenizers")
    vocab = model.get("vocab")
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)]
    for number in ids:
        if type(number) is not int or not 0 <= number < _MOST_IDS:
            raise UserError(f"{path} gives a token the id {number!r:.60}: from 0 to {_MOST_IDS:,}")
    for key, value in _items(values):
        if key == "precompiled_charsmap" and not _is_charsmap(value):
            raise UserError(f"{path} is damaged: its precompiled_charsmap is cut or altered")
        if key == "Fixed" and not (type(value) is int and 0 <= value <= _MOST_PADDING):
            raise UserError(f"{path} pads every text to {value!r:.60} tokens")
        if key in ("prepend", "content") and isinstance(value, str) and len(value) > _LONGEST_TEXT:
            raise UserError(f"{path} has a text of {len(value):,} characters as {key}")


def _items(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key and value at any depth, except in the vocabulary and the merges."""
    pending: list[Any] = [{k: v for k, v in values.items() if k != "model"}]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value.items()
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _is_charsmap(value: Any) -> bool:
    """Return whether the length at the beginning of the trie fits."""
    if value is None:
        return True
    try:
        content = base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError):
        return False
    size = int.from_bytes(content[:4], "little")
    return len(content) >= 4 and 4 <= size <= len(content) - 4 and size % 4 == 0
