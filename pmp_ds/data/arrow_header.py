"""Whether a record batch of an Arrow stream is packed: such a one takes any amount of memory.

Arrow unpacks as it reads, and pyarrow has no way to refuse that. The flag is in the flatbuffer that
stands before the batch (Message.fbs of Arrow, format 1.0 and later).
"""

import struct

import pyarrow as pa

_HEADER = 2  # field of Message
_COMPRESSION = 3  # field of RecordBatch


def is_packed(metadata: bytes) -> bool:
    """Whether ``metadata`` of a record batch's message name a compression. Raises ArrowInvalid when
    they are damaged."""
    try:
        (message,) = struct.unpack_from("<I", metadata)
        place = _field(metadata, message, _HEADER)
        (offset,) = struct.unpack_from("<I", metadata, place)
        return place == 0 or _field(metadata, place + offset, _COMPRESSION) != 0
    except struct.error as error:
        raise pa.ArrowInvalid(f"its header is damaged: {error}") from None


def _field(metadata: bytes, table: int, number: int) -> int:
    """Where a field of the table at ``table`` stands; 0 where it is left out."""
    (back,) = struct.unpack_from("<i", metadata, table)
    index = table - back
    if not 0 <= index < len(metadata):
        raise struct.error("a table lies outside")
    (size,) = struct.unpack_from("<H", metadata, index)
    if 4 + 2 * number >= size:
        return 0
    (offset,) = struct.unpack_from("<H", metadata, index + 4 + 2 * number)
    return table + offset if offset else 0
