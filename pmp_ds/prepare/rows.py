"""Rows of an input: which are documents, and how long a document may be."""

import codecs
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, cast

from pmp_ds.errors import UserError
from pmp_ds.prepare.corpus import Rejects, Source

LONGEST = 64 << 20
"""Maximum bytes of a document, or of a line of JSON."""
_EXPANSION = 200
_FREE_BYTES = 2 << 20
"""Input that unpacks to more bytes than this may be at most _EXPANSION times as long as the file:
text rarely shrinks below a tenth, a crafted file without limit."""


def open_source(source: Source) -> BinaryIO:
    """Open a file or URL for reading bytes."""
    if source.url is None:
        return open(source.path, "rb")
    import fsspec

    return cast(BinaryIO, fsspec.open(source.url, "rb").open())


def parse_row(row: Any, text_field: str) -> tuple[str | None, str]:
    """Return the text of a decoded row, or None and the fault."""
    if not isinstance(row, dict):
        return None, "not a JSON object"
    if text_field not in row:
        return None, f"no field {text_field!r}"
    text = row[text_field]
    if not isinstance(text, str):
        return None, f"field {text_field!r} is not a string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800": JSON can contain half a character
        return None, "half of a surrogate pair"
    return text, ""


def accepted(rows: Iterable[tuple[str, bytes]], rejects: Rejects) -> Iterator[bytes]:
    """Yield the rows that are documents; count the others in ``rejects``."""
    for where, raw in rows:
        rejects.rows += 1
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            rejects.add("UTF-16, not UTF-8" if wide else "invalid UTF-8", f"{where}:{line}")
            continue
        if text.strip():
            yield raw.removeprefix(codecs.BOM_UTF8)
        else:
            rejects.add_empty(where)


def too_long(source: Source, what: str) -> UserError:
    return UserError(
        f"input {source.name} is too long: {what}, but a document may have at most {LONGEST:,} "
        "bytes; divide it, for example with `split -C 32M`"
    )


def require_plausible(source: Source, unpacked: int, packed: int) -> None:
    """Raise UserError for input that unpacks to far more than text does."""
    if unpacked > _FREE_BYTES + _EXPANSION * packed:
        raise UserError(
            f"input {source.name} unpacks to more than {_EXPANSION} times its size, unlike any "
            "text; remove it, or unpack it yourself"
        )
