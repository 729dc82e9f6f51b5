"""Read the documents of one source and count its other rows. Imports without torch."""

import os
import zlib
from collections.abc import Callable, Iterator

import pyarrow as pa

from pmp_ds.errors import UserError
from pmp_ds.prepare.corpus import PYTHON, Rejects, Source
from pmp_ds.prepare.jsonl import json_documents
from pmp_ds.prepare.parquet import parquet_documents
from pmp_ds.prepare.rows import LONGEST, accepted, open_source, too_long
from pmp_ds.prepare.streams import read_stream


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
                if source.kind == "text":
                    if source.num_bytes > LONGEST:
                        raise too_long(source, "it is one document")
                    yield from accepted([(source.name, raw.read())], rejects)
                    on_bytes(source.num_bytes)
                elif source.kind == "parquet":
                    yield from parquet_documents(source, raw, text_field, rejects)
                    on_bytes(source.num_bytes)
                else:
                    yield from json_documents(source, raw, text_field, rejects, on_bytes)
            _require_unchanged(source)
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise UserError(f"input {source.url or source.path} cannot be read: {said:.300}") from error


def read_texts(source: Source, text_field: str, rejects: Rejects) -> Iterator[str]:
    """Yield the documents of ``read_documents``, decoded."""
    return (document.decode("utf-8") for document in read_documents(source, text_field, rejects))


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
