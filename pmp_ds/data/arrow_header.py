"""Detect compressed record batches in an Arrow stream, which may need any amount of memory.

Arrow decompresses while it reads, and pyarrow cannot be told to refuse. The flag is in the
flatbuffer before the batch (Message.fbs of Arrow, format 1.0 and later).
"""

import struct

import pyarrow as pa

_HEADER = 2  # field of Message
_COMPRESSION = 3  # field of RecordBatch


def is_packed(metadata: bytes) -> bool:
    """Return whether a record batch's message ``metadata`` name a compression. Raises ArrowInvalid
    when they are damaged."""
    try:
        (message,) = struct.unpack_from("<I", metadata)
        place = _field(metadata, message, _HEADER)
        (offset,) = struct.unpack_from("<I", metadata, place)
        return place == 0 or _field(metadata, place + offset, _COMPRESSION) != 0
    except struct.error as error:
        raise pa.ArrowInvalid(f"its header is damaged: {error}") from None


def _field(metadata: bytes, table: int, number: int) -> int:
    """Return the position of a field in the table at ``table``, or 0 if it is left out."""
    (back,) = struct.unpack_from("<i", metadata, table)
    index = table - back
    if not 0 <= index < len(metadata):
        raise struct.error("a table lies outside")
    (size,) = struct.unpack_from("<H", metadata, index)
    if 4 + 2 * number >= size:
        return 0
    (offset,) = struct.unpack_from("<H", metadata, index + 4 + 2 * number)
    return table + offset if offset else 0
