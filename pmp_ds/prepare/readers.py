"""Read the documents of one source and count its other rows. Imports without torch.

A new kind of file is a ``Reader`` in ``READERS``, and its ending in ``inputs.SUFFIXES``.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pyarrow as pa

from pmp_ds.errors import UserError
from pmp_ds.prepare.corpus import PYTHON, Rejects, Source
from pmp_ds.prepare.jsonl import json_documents
from pmp_ds.prepare.parquet import parquet_documents
from pmp_ds.prepare.rows import LONGEST, accepted, open_source, too_long
from pmp_ds.prepare.streams import read_stream

Reader = Callable[[Source, BinaryIO, str, Rejects, Callable[[int], None]], Iterator[bytes]]
"""Takes a source, its open file, the field with the text, where other rows are counted, and what
is called with the number of bytes read; yields documents in order, valid UTF-8 and not blank."""


def read_documents(
    source: Source,
    text_field: str,
    rejects: Rejects,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Iterator[bytes]:
    """Yield the documents of one source in order, as valid UTF-8, none of them empty.

    Other rows are counted in ``rejects``; ``on_bytes`` is called with the number of bytes read
    since its last call. Raises UserError for a source that cannot be read or decompressed.
    """
    try:
        if source.kind == "topics":
            yield from accepted(topics(), rejects)
            on_bytes(source.num_bytes)
        elif source.kind == "stream":
            texts = read_stream(source, text_field, rejects, shuffle=False)
            yield from (text.encode("utf-8") for text in texts)
        else:
            with open_source(source) as raw:
                yield from READERS[source.kind](source, raw, text_field, rejects, on_bytes)
            _require_unchanged(source)
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise UserError(f"input {source.url or source.path} cannot be read: {said:.300}") from error


def read_texts(source: Source, text_field: str, rejects: Rejects) -> Iterator[str]:
    """Yield the documents of ``read_documents``, decoded."""
    return (document.decode("utf-8") for document in read_documents(source, text_field, rejects))


def _whole_file(
    source: Source,
    raw: BinaryIO,
    text_field: str,
    rejects: Rejects,
    on_bytes: Callable[[int], None],
) -> Iterator[bytes]:
    """Yield the file as one document."""
    if source.num_bytes > LONGEST:
        raise too_long(source, "it is one document")
    yield from accepted([(source.name, raw.read())], rejects)
    on_bytes(source.num_bytes)


def _parquet(
    source: Source,
    raw: BinaryIO,
    text_field: str,
    rejects: Rejects,
    on_bytes: Callable[[int], None],
) -> Iterator[bytes]:
    yield from parquet_documents(source, raw, text_field, rejects)
    on_bytes(source.num_bytes)


READERS: dict[str, Reader] = {"text": _whole_file, "jsonl": json_documents, "parquet": _parquet}
"""By ``Source.kind``, for files."""


def topics() -> list[tuple[str, bytes]]:
    """Return the texts of ``help('...')`` as (name, UTF-8)."""
    from pydoc_data.topics import topics

    return [(f"{PYTHON}:topics:{name}", topics[name].encode("utf-8")) for name in sorted(topics)]


def _require_unchanged(source: Source) -> None:
    """Raise UserError for a file that was written to while it was read."""
    if source.url is None and source.version:
        facts = os.stat(source.path)
        whole = source.num_parts == 1
        if str(facts.st_mtime_ns) != source.version or (
            whole and facts.st_size != source.num_bytes
        ):
            raise UserError(
                f"input {source.path} changed while it was read: wait until it is complete, then "
                "start again"
            )
