"""safetensors files and Arrow shards with false headers."""

import io
import json
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from tests.helpers.crafted.variants import DEEP, NASTY


def file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with this header, of this stated length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def files(name: str, shape: list[int]) -> Iterator[tuple[str, bytes]]:
    """Yield (fault, content) of files that should hold F32 ``name`` in ``shape``."""
    size = 4 * int(np.prod(shape))
    good: dict[str, Any] = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    data = bytes(size)
    for length in (0, 1, 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
        yield f"header of {length} bytes", file({name: good}, data, length)
    wrong: dict[str, dict[str, Any]] = {
        "dtype": {"dtype": "F999"},
        "dtype null": {"dtype": None},
        "dtype bits": {"dtype": "F4"},
        "dtype I64": {"dtype": "I64"},
        "dtype BOOL": {"dtype": "BOOL"},
        "dtype C64": {"dtype": "C64"},
        "negative": {"shape": [-1, *shape[1:]]},
        "huge": {"shape": [1 << 72]},
        "overflow": {"shape": [1 << 33, 1 << 33]},
        "wraps to right": {"shape": [1 << 62, 4, size]},
        "zero and huge": {"shape": [0, 1 << 62], "data_offsets": [0, 0]},
        "text": {"shape": "x"},
        "fraction": {"shape": [0.5]},
        "many dimensions": {"shape": [1] * 1000},
        "empty shape": {"shape": []},
        "beyond": {"data_offsets": [0, 1 << 40]},
        "backwards": {"data_offsets": [size, 0]},
        "negative offset": {"data_offsets": [-4, size]},
        "hole": {"data_offsets": [4, size]},
        "one offset": {"data_offsets": [0]},
        "more": {"extra": NASTY},
    }
    for what, change in wrong.items():
        yield what, file({name: good | change}, data)
    yield "no offsets", file({name: {"dtype": "F32", "shape": shape}}, data)
    yield "tensor null", file({name: None}, data)
    yield "same place", file({name: good, "b": good}, data)
    yield "terminal", file({NASTY: good}, data)
    yield (
        "one more, terminal",
        file({name: good, NASTY: good | {"data_offsets": [size, 2 * size]}}, data * 2),
    )
    yield "no name", file({"": good}, data)
    yield "long name", file({"x" * 10**6: good}, data)
    twice = json.dumps({name: good})
    yield "name twice", file((twice[:-1] + ", " + twice[1:]).encode(), data)
    yield "metadata list", file({"__metadata__": [], name: good}, data)
    yield "metadata number", file({"__metadata__": {"format": 5}, name: good}, data)
    yield "metadata other", file({"__metadata__": {"format": "tf"}, name: good}, data)
    yield (
        "metadata terminal",
        file({"__metadata__": {"format": "pt", NASTY: NASTY}, name: good}, data),
    )
    yield "nothing", file({})
    yield "header list", file([])
    yield "header nested", file(b"[" * DEEP)
    yield "header objects", file(b'{"a":' * DEEP)
    yield "header not UTF-8", file(b'{"\xff": 1}')
    yield (
        "many tensors",
        file(
            {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
        ),
    )


def arrows() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield (fault, maker of the content) of shards for 20 blocks of 4 uint32 tokens."""
    values = np.arange(80, dtype=np.uint32)
    good = pa.FixedSizeListArray.from_arrays(pa.array(values), 4)
    columns: dict[str, Any] = {
        "uint16": pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.uint16)), 4),
        "int64": pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.int64)), 4),
        "float": pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32)), 4),
        "text": pa.FixedSizeListArray.from_arrays(pa.array([str(v) for v in values]), 4),
        "plain": pa.array(values),
        "list": pa.array([[1, 2, 3, 4]] * 20),
        "null": pa.nulls(20),
        "blocks of 1": pa.FixedSizeListArray.from_arrays(pa.array(values), 1),
        "blocks of 80": pa.FixedSizeListArray.from_arrays(pa.array(values), 80),
        "nulls": pa.array([None, *[[1, 2, 3, 4]] * 19], pa.list_(pa.uint32(), 4)),
        "nulls inside": pa.array([[None, 2, 3, 4]] * 20, pa.list_(pa.uint32(), 4)),
        "empty": good[:0],
        "a part": good[3:],
        "dictionary": pa.array(["a"] * 20).dictionary_encode(),
        "nested": pa.array([[[1]] * 4] * 20, pa.list_(pa.list_(pa.uint32()), 4)),
    }
    for name, column in columns.items():
        yield name, partial(_stream, {"input_ids": column})
    yield "another name", partial(_stream, {NASTY: good})
    yield "two columns", partial(_stream, {"input_ids": good, "more": good})
    yield "no batch", partial(_stream, {"input_ids": good}, batches=0)
    yield "two batches", partial(_stream, {"input_ids": good}, batches=2)
    for packing in ("lz4", "zstd"):
        yield f"packed, {packing}", partial(_stream, {"input_ids": good}, packing=packing)
        yield f"512 MiB of zeros, {packing}", partial(_zeros, packing)
    yield "a file, not a stream", partial(_stream, {"input_ids": good}, new=pa.ipc.new_file)


def _zeros(packing: str) -> bytes:
    zeros = pa.array(np.zeros(1 << 27, dtype=np.uint32))
    return _stream({"input_ids": pa.FixedSizeListArray.from_arrays(zeros, 4)}, packing=packing)


def _stream(
    columns: dict[str, Any],
    batches: int = 1,
    packing: str | None = None,
    new: Any = pa.ipc.new_stream,
) -> bytes:
    sink = io.BytesIO()
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    options = pa.ipc.IpcWriteOptions(compression=packing)
    with new(sink, batch.schema, options=options) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    return sink.getvalue()
