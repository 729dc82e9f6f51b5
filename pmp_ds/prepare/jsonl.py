"""Read the documents of a JSON lines file, plain or compressed, or of a part of one."""

import functools
import gzip
import io
import json
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.json

from pmp_ds.prepare.corpus import Rejects, Source
from pmp_ds.prepare.rows import LONGEST, open_source, parse_row, require_plausible, too_long

_CHUNK_BYTES = 4 << 20
_FIRST_CHUNK_BYTES = 1 << 18  # small, because a sample needs only the beginning of a source


def json_documents(
    source: Source,
    raw: BinaryIO,
    text_field: str,
    rejects: Rejects,
    on_bytes: Callable[[int], None],
) -> Iterator[bytes]:
    """Yield the documents of lines that begin in the source's part of the file."""
    file: BinaryIO = raw
    if source.name.endswith(".gz"):
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    elif source.name.endswith(".zst"):
        # PythonFile closes the file that it wraps, like every reader here.
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
        require_plausible(source, unpacked, raw.tell() - start)
        if of_line > LONGEST:
            raise too_long(source, f"the line that begins after line {lines}")

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
    """Read the rest of a line and return its length."""
    length = 0
    for piece in iter(lambda: raw.readline(_CHUNK_BYTES), b""):
        length += len(piece)
        if length > LONGEST:
            raise too_long(source, f"the line around byte {source.first_byte:,}")
        if piece.endswith(b"\n"):
            break
    return length


def _chunks(
    file: BinaryIO, num_bytes: int | None, check: Callable[[int, int], None]
) -> Iterator[bytes]:
    """Yield whole lines together, about ``_CHUNK_BYTES`` at a time: all lines, or those that begin
    within the next ``num_bytes``. ``check`` is called with the bytes of each read and those of the
    chunk so far.
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
    """Return the texts of whole JSON lines, parsed by Arrow in a third of the time.

    Returns None unless every line is plainly one object with a text; the caller then parses the
    lines one by one.
    """
    if not chunk.startswith(b"{"):
        return None
    data = np.frombuffer(chunk, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if not chunk.endswith(b"\n"):
        ends = np.append(ends, len(chunk))
    starts = np.concatenate([[0], ends[:-1] + 1])
    # No object spans two such lines: a comma would have to stand between `}` and `{`.
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
        )  # pandas writes null for a missing text; in a stream the field may be missing
    return parse_row(row, text_field)


@functools.lru_cache(maxsize=4)
def _lines_before(source: Source, position: int) -> int:
    """Return the number of line ends before ``position``, needed only to report rows."""
    count = 0
    with open_source(source) as file:
        while position > 0 and (chunk := file.read(min(1 << 20, position))):
            count += chunk.count(b"\n")
            position -= len(chunk)
    return count
