"""Write the tokenizer next to the blocks, and report where a plain ``AutoTokenizer`` differs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from pmp_ds.errors import UserError
from pmp_ds.prepare.tokenizer import Tokenizer
from pmp_ds.run_dir import fsync_dir, sha256

_COMPARED_CHARS = 1000


def save_tokenizer(tokenizer: Tokenizer, folder: Path, bos: str) -> dict[str, str]:
    """Write the tokenizer's files; return their sha256 by path in ``folder``. Further chat
    templates are in a folder of their own.

    With ``bos: document``, files made by us put begin of text before a text, as in the packed
    documents; a tokenizer from elsewhere stays as it is.
    """
    tokenizer.save_pretrained(folder)
    if bos == "document" and tokenizer.kind != "huggingface" and tokenizer.bos_id is not None:
        _prepend_bos(folder, tokenizer.bos_id)
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_dir(path)
            continue
        digests[path.relative_to(folder).as_posix()] = sha256(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    fsync_dir(folder)
    return digests


def about_saved(
    tokenizer: Tokenizer, folder: Path, sample: Sequence[str], bos_id: int | None
) -> list[str]:
    """Return warnings about the tokenizer in ``folder``; a trained one must be exact."""
    reader = plain_reader(folder)
    compared, other_ids, other_text = count_mismatches(tokenizer, reader, sample)
    if tokenizer.kind == "trained" and other_ids:
        raise UserError(
            f"AutoTokenizer gives other ids on {other_ids} of {compared} documents than the "
            "tokenizer trained here: this is a bug, please report it"
        )
    warnings = []
    if other_ids:
        warnings.append(
            f"AutoTokenizer on tokenizer/ gives other ids than this {tokenizer.kind} tokenizer "
            f"on {other_ids} of {compared} sampled documents: a release would use the former"
        )
    before = _ids_before(reader)
    packed = [] if bos_id is None else [bos_id]
    if before != packed:
        warnings.append(
            f"AutoTokenizer on {folder.name}/ puts the ids {before} before a text by default, the "
            f"packed documents have {packed}: encode prompts as they are packed, or change bos"
        )
    if other_text:
        warnings.append(
            f"decode does not exactly restore {other_text} of {compared} sampled documents"
        )
    return warnings


def plain_reader(folder: Path) -> Any:
    """Return the tokenizer that a user of `transformers` gets for ``folder``."""
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    reader.model_max_length = 1 << 62  # no warning: long documents are fine here
    return reader


def count_mismatches(
    tokenizer: Tokenizer, reader: Any, texts: Sequence[str]
) -> tuple[int, int, int]:
    """Compare ``tokenizer`` with the ``plain_reader`` of the folder it was saved in.

    Returns (texts compared, texts with other ids, texts that ``decode`` does not restore), judged
    by their first ``_COMPARED_CHARS``. Texts with a special token are left out, because there the
    two differ on purpose.
    """
    texts = [text[:_COMPARED_CHARS] for text in texts]
    texts = [text for text in texts if not any(name in text for name in tokenizer.special_tokens)]
    other_ids = other_text = 0
    for text, expected in zip(texts, tokenizer.encode_batch(texts), strict=True):
        found = reader.encode(text, add_special_tokens=False)
        other_ids += found != expected.tolist()
        other_text += reader.decode(expected.tolist()) != text
    return len(texts), other_ids, other_text


def _prepend_bos(folder: Path, bos_id: int) -> None:
    """Make a plain ``AutoTokenizer`` of ``folder`` begin every text with ``bos_id``, except with
    ``add_special_tokens=False``.
    """
    path = folder / "tokenizer.json"
    fast = FastTokenizer.from_file(str(path))
    name = fast.id_to_token(bos_id)
    fast.post_processor = TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A $B:1", special_tokens=[(name, bos_id)]
    )
    fast.save(str(path))


def _ids_before(reader: Any) -> list[int]:
    """Return the ids that ``reader`` puts before a text by default."""
    ids: list[int] = reader.encode("a")
    plain: list[int] = reader.encode("a", add_special_tokens=False)
    starts = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
    return ids[: next(starts, 0)]
