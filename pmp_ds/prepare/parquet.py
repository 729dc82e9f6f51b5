"""Read the documents of a Parquet file, or of a part of its row groups."""

import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from pmp_ds.errors import UserError
from pmp_ds.prepare.corpus import Rejects, Source
from pmp_ds.prepare.rows import LONGEST, accepted, require_plausible, too_long

_ROWS = 16  # per batch: decoding expands a text stored once in a dictionary to once per row


def parquet_documents(
    source: Source, raw: BinaryIO, text_field: str, rejects: Rejects
) -> Iterator[bytes]:
    """Yield the rows of the source's part of the row groups."""
    import pyarrow.parquet as pq

    size = raw.seek(0, os.SEEK_END)
    file = pq.ParquetFile(raw)
    names = file.schema_arrow.names
    if text_field not in names:
        raise UserError(
            f"input {source.name} has no column {text_field!r}, only {', '.join(names):.200}; set "
            "text_field"
        )
    kind = file.schema_arrow.field(text_field).type
    if not _is_text(kind):
        raise UserError(
            f"column {text_field!r} of input {source.name} has type {kind!s:.80}, not text; set "
            "text_field"
        )
    groups = range(file.num_row_groups)
    first, last = (len(groups) * p // source.num_parts for p in (source.part, source.part + 1))
    _require_plausible_groups(source, file, groups[first:last], text_field, size)
    row = sum(file.metadata.row_group(group).num_rows for group in range(first))
    unpacked = 0
    for batch in file.iter_batches(_ROWS, groups[first:last], [text_field]):
        for value in batch.column(0).cast(pa.large_binary()).to_pylist():
            row += 1
            where = f"{source.name}:{row}"
            unpacked += len(value or b"")
            require_plausible(source, unpacked, size)
            yield from accepted([(where, value or b"")], rejects)


def _require_plausible_groups(
    source: Source, file: Any, groups: range, text_field: str, size: int
) -> None:
    """Raise UserError for row groups that claim more content than text has. Arrow unpacks whole
    pages, and a text is never split into pages."""
    names = [file.schema.column(i).path for i in range(len(file.schema))]
    column, unpacked = names.index(text_field), 0
    for group in groups:
        chunk = file.metadata.row_group(group).column(column)
        unpacked += chunk.total_uncompressed_size
        require_plausible(source, unpacked, size)
        if chunk.total_uncompressed_size > LONGEST * max(1, chunk.num_values):
            raise too_long(source, f"row group {group} has {chunk.num_values} documents")


def _is_text(kind: pa.DataType) -> bool:
    """Return whether a column is text in one of Arrow's forms: pandas and polars write views and
    dictionaries, and a column of nulls has its own type."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    types = pa.types
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_null,
    )
    return any(test(kind) for test in tests)
