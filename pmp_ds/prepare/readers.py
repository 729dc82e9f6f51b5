"""The documents of one source, and the rows in it that are none. Imports without torch."""

import codecs
import functools
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.json

from pmp_ds.errors import UserError
from pmp_ds.prepare.corpus import PYTHON, Rejects, Source

_CHUNK_BYTES = 4 << 20
_FIRST_CHUNK_BYTES = 1 << 18  # small: a sample takes no more of a source than its beginning
_PARQUET_ROWS = 16  # at a time: a text in a dictionary is there once, and then once a row
LONGEST = 64 << 20
"""Bytes of one document, or of one line of JSON."""
_EXPANSION = 200
_FREE_BYTES = 2 << 20
"""What unpacks to more than so many bytes may be _EXPANSION times as long as the file: text is
seldom packed to less than a tenth, a crafted file to any part."""


def read_documents(
    source: Source,
    text_field: str,
    rejects: Rejects,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Iterator[bytes]:
    """The documents of one source in order, as valid UTF-8, none of them empty.

    Rows that are no document are counted in ``rejects``; ``on_bytes`` hears how many more bytes of
    the source are done. Raises UserError for one that cannot be read or decompressed.
    """
    try:
        if source.kind == "topics":
            yield from _accepted(topics(), rejects)
            on_bytes(source.num_bytes)
        elif source.kind == "stream":
            from pmp_ds.prepare.streams import read_stream

            texts = read_stream(source, text_field, rejects, shuffle=False)
            yield from (text.encode("utf-8") for text in texts)
        else:
            with open_source(source) as raw:
                if source.kind == "text":
                    if source.num_bytes > LONGEST:
                        raise _too_long(source, "it is one document")
                    yield from _accepted([(source.name, raw.read())], rejects)
                    on_bytes(source.num_bytes)
                elif source.kind == "parquet":
                    yield from _parquet_documents(source, raw, text_field, rejects)
                    on_bytes(source.num_bytes)
                else:
                    yield from _json_documents(source, raw, text_field, rejects, on_bytes)
            _require_unchanged(source)
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise UserError(f"input {source.url or source.path} cannot be read: {said:.300}") from error


def read_texts(source: Source, text_field: str, rejects: Rejects) -> Iterator[str]:
    """``read_documents``, decoded."""
    return (document.decode("utf-8") for document in read_documents(source, text_field, rejects))


def open_source(source: Source) -> BinaryIO:
    """The bytes of a file or URL."""
    if source.url is None:
        return open(source.path, "rb")
    import fsspec

    return cast(BinaryIO, fsspec.open(source.url, "rb").open())


def topics() -> list[tuple[str, bytes]]:
    """The texts behind ``help('...')``, as (name, UTF-8)."""
    from pydoc_data.topics import topics

    return [(f"{PYTHON}:topics:{name}", topics[name].encode("utf-8")) for name in sorted(topics)]


def parse_row(row: Any, text_field: str) -> tuple[str | None, str]:
    """The text of one decoded row, or None and what is wrong with it."""
    if not isinstance(row, dict):
        return None, "not a JSON object"
    if text_field not in row:
        return None, f"no field {text_field!r}"
    text = row[text_field]
    if not isinstance(text, str):
        return None, f"field {text_field!r} is not a string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800": JSON can spell half a character
        return None, "half of a surrogate pair"
    return text, ""


def _too_long(source: Source, what: str) -> UserError:
    return UserError(
        f"input {source.name} is too long: {what}, and a document has at most {LONGEST:,} bytes; "
        "divide it into several, as `split -C 32M` does"
    )


def _require_plausible(source: Source, unpacked: int, packed: int) -> None:
    """Raise UserError for what unpacks to far more than text does."""
    if unpacked > _FREE_BYTES + _EXPANSION * packed:
        raise UserError(
            f"input {source.name} unpacks to more than {_EXPANSION} times its size, as no text "
            "does; remove it, or unpack it yourself"
        )


def _accepted(rows: Iterable[tuple[str, bytes]], rejects: Rejects) -> Iterator[bytes]:
    """Rows that are a document as they are."""
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


def _json_documents(
    source: Source,
    raw: BinaryIO,
    text_field: str,
    rejects: Rejects,
    on_bytes: Callable[[int], None],
) -> Iterator[bytes]:
    """The lines that begin in the source's part of the file."""
    file: BinaryIO = raw
    if source.name.endswith(".gz"):
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    elif source.name.endswith(".zst"):
        # PythonFile closes what it wraps, like every reader here.
        stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
        file = cast(BinaryIO, io.BufferedReader(stream))
    start, end = source.first_byte, source.first_byte + source.num_bytes
    if start:
        raw.seek(start - 1)
        start += _line_length(source, raw) - 1
    whole = source.num_parts == 1
    done, lines = source.first_byte, 0

    def where(line: int) -> str:
        return f"{source.name}:{line + (_lines_before(source, start) if start else 0)}"

    unpacked = 0

    def check(num_bytes: int, of_line: int) -> None:
        nonlocal unpacked
        unpacked += num_bytes
        _require_plausible(source, unpacked, raw.tell() - start)
        if of_line > LONGEST:
            raise _too_long(source, f"the line that begins after line {lines}")

    for chunk in _chunks(file, None if whole else end - start, check):
        if chunk.isspace():
            lines += chunk.count(b"\n")
            continue
        documents = parse_chunk(chunk, text_field)
        if documents is not None:
            rejects.rows += len(documents)
            for line_number, document in enumerate(documents, start=lines + 1):
                if _is_blank(document):
                    rejects.add_empty(where(line_number))
                else:
                    yield document
            lines += len(documents)
        else:
            for line in io.BytesIO(chunk):
                lines += 1
                if not line.strip():
                    continue
                rejects.rows += 1
                text, reason = _parse_line(line, text_field)
                if text is not None and text.strip():
                    yield text.encode("utf-8")
                    continue
                if text is None:
                    rejects.add(reason, where(lines))
                else:
                    rejects.add_empty(where(lines))
        position = min(raw.tell(), end)
        on_bytes(position - done)
        done = position
    on_bytes(end - done)


def _line_length(source: Source, raw: BinaryIO) -> int:
    """How long the rest of a line is; it is read."""
    length = 0
    for piece in iter(lambda: raw.readline(_CHUNK_BYTES), b""):
        length += len(piece)
        if length > LONGEST:
            raise _too_long(source, f"the line around byte {source.first_byte:,}")
        if piece.endswith(b"\n"):
            break
    return length


def _chunks(
    file: BinaryIO, num_bytes: int | None, check: Callable[[int, int], None]
) -> Iterator[bytes]:
    """Whole lines together, up to about ``_CHUNK_BYTES`` at a time: those that begin within the
    next ``num_bytes``, or all. ``check`` is called with how many bytes each read gave, and how many
    there are of the chunk.
    """
    size = min(_FIRST_CHUNK_BYTES, _CHUNK_BYTES)
    while num_bytes is None or num_bytes > 0:
        pieces = [file.read(size if num_bytes is None else min(size, num_bytes))]
        size = min(2 * size, _CHUNK_BYTES)
        if not pieces[0]:
            return
        length = len(pieces[0])
        check(length, length)
        while not pieces[-1].endswith(b"\n") and (more := file.readline(_CHUNK_BYTES)):
            pieces.append(more)
            length += len(more)
            check(len(more), length)
        if num_bytes is not None:
            num_bytes -= length
        yield b"".join(pieces)


def parse_chunk(chunk: bytes, text_field: str) -> list[bytes] | None:
    """The texts of whole JSON lines by Arrow's parser, in a third of the time of one by one.

    None unless every line is plainly one object with a text: then the lines have to be looked at
    one by one.
    """
    if not chunk.startswith(b"{"):
        return None
    data = np.frombuffer(chunk, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if not chunk.endswith(b"\n"):
        ends = np.append(ends, len(chunk))
    starts = np.concatenate([[0], ends[:-1] + 1])
    # No object spans two such lines: between `}` and `{` there would have to be a comma.
    if not ((data[starts] == ord("{")) & (data[ends - 1] == ord("}"))).all():
        return None
    try:
        offsets = pa.py_buffer(np.array([0, len(chunk)], np.int32))
        pa.StringArray.from_buffers(1, offsets, pa.py_buffer(chunk)).validate(full=True)
        table = pyarrow.json.read_json(
            pa.BufferReader(chunk),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(chunk) + 1),
            pyarrow.json.ParseOptions(
                explicit_schema=pa.schema([(text_field, pa.string())]),
                unexpected_field_behavior="ignore",
            ),
        )
    except pa.ArrowException:
        return None
    column = table.column(0)
    if len(column) != len(ends) or column.null_count:
        return None
    return [text for part in column.chunks for text in part.cast(pa.binary()).to_pylist()]


def _is_blank(document: bytes) -> bool:
    return not b"!" <= document[:1] <= b"~" and not document.decode("utf-8").strip()


def _parse_line(line: bytes, text_field: str) -> tuple[str | None, str]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None, "invalid UTF-8"
    except (ValueError, RecursionError):
        return None, "not JSON"
    if isinstance(row, dict) and row.get(text_field, "") is None:
        return (
            "",
            "",
        )  # what pandas writes for a missing text; of a stream it may be a missing field
    return parse_row(row, text_field)


@functools.lru_cache(maxsize=4)
def _lines_before(source: Source, position: int) -> int:
    """Line ends before ``position``; only asked for rows that are reported."""
    count = 0
    with open_source(source) as file:
        while position > 0 and (chunk := file.read(min(1 << 20, position))):
            count += chunk.count(b"\n")
            position -= len(chunk)
    return count


def _parquet_documents(
    source: Source, raw: BinaryIO, text_field: str, rejects: Rejects
) -> Iterator[bytes]:
    """The rows of the source's part of the row groups."""
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
            f"column {text_field!r} of input {source.name} holds {kind!s:.80}, no text; set "
            "text_field"
        )
    groups = range(file.num_row_groups)
    first, last = (len(groups) * p // source.num_parts for p in (source.part, source.part + 1))
    _require_plausible_groups(source, file, groups[first:last], text_field, size)
    row = sum(file.metadata.row_group(group).num_rows for group in range(first))
    unpacked = 0
    for batch in file.iter_batches(_PARQUET_ROWS, groups[first:last], [text_field]):
        for value in batch.column(0).cast(pa.large_binary()).to_pylist():
            row += 1
            where = f"{source.name}:{row}"
            unpacked += len(value or b"")
            _require_plausible(source, unpacked, size)
            yield from _accepted([(where, value or b"")], rejects)


def _require_plausible_groups(
    source: Source, file: Any, groups: range, text_field: str, size: int
) -> None:
    """Raise UserError when row groups say that they hold more than text does: Arrow unpacks a page
    whole, and a text has no pages."""
    names = [file.schema.column(i).path for i in range(len(file.schema))]
    column, unpacked = names.index(text_field), 0
    for group in groups:
        chunk = file.metadata.row_group(group).column(column)
        unpacked += chunk.total_uncompressed_size
        _require_plausible(source, unpacked, size)
        if chunk.total_uncompressed_size > LONGEST * max(1, chunk.num_values):
            raise _too_long(source, f"row group {group} has {chunk.num_values} documents")


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column is text in one of Arrow's ways: pandas and polars write views and
    dictionaries, and nothing but nulls has a type of its own."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    types = pa.types
    tests = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
        types.is_large_binary, types.is_binary_view, types.is_null,
    )  # fmt: skip
    return any(test(kind) for test in tests)


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
