"""Untrusted text for `prepare_data`: JSON lines, compressed or plain, Parquet and plain text."""

import bz2
import gzip
import io
import json
import lzma
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.crafted.variants import DEEP, NASTY, Change

FILES = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.txt")
TEXTS = [f"document {number} of a small corpus" for number in range(12)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def write(folder: Path) -> None:
    """Write a valid corpus, with a file of each type, into ``folder``."""
    home = folder / "corpus"
    home.mkdir()
    contents = (LINES, gzip.compress(LINES), zstd(LINES), parquet(), TEXTS[0].encode() * 10)
    for name, content in zip(FILES, contents, strict=True):
        (home / name).write_bytes(content)


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def parquet(column: Any = None, name: str = "text", **options: Any) -> bytes:
    """Write a file with one column, of texts unless another is given."""
    sink = io.BytesIO()
    values = pa.array(TEXTS) if column is None else column
    pq.write_table(pa.table({name: values}), sink, **options)
    return sink.getvalue()


def named() -> Iterator[tuple[str, Change]]:
    """Yield (name, change of the folder)."""
    for name, content in _rows().items():
        yield f"a.jsonl: {name}", _file("a.jsonl", LINES * 20 + content)
        yield f"a.jsonl: only {name}", _file("a.jsonl", content)
    for name, change in _PACKED.items():
        yield f"packed: {name}", change
    for name, make in _columns():
        yield f"d.parquet: {name}", _file("d.parquet", make)
    good = parquet(use_dictionary=True, compression="zstd")
    for start in range(4, len(good), 5):
        changed = good[:start] + b"\xff" * 3 + good[start + 3 :]
        yield f"d.parquet: bytes from {start} on set", _file("d.parquet", changed)
        zero = good[:start] + bytes(3) + good[start + 3 :]
        yield f"d.parquet: bytes from {start} on zero", _file("d.parquet", zero)
    for cut in range(0, len(good), 40):
        yield f"d.parquet: cut at {cut}", _file("d.parquet", good[:cut])
    for length in (0, 1, len(good), 1 << 30, (1 << 31) - 1, (1 << 32) - 1):
        changed = good[:-8] + struct.pack("<I", length) + b"PAR1"
        yield f"d.parquet: a footer of {length} bytes", _file("d.parquet", changed)
    for name in (NASTY.replace("/", "") + ".txt", "x.jsonl.bz2", "x.jsonl.xz", "f.parquet.gz"):
        yield f"beside it {name[:12]!r}", _file(name, LINES)


def _file(name: str, content: bytes | Callable[[], bytes]) -> Change:
    def change(folder: Path) -> None:
        made = content if isinstance(content, bytes) else content()
        (folder / "corpus" / name).write_bytes(made)

    return change


def _rows() -> dict[str, bytes]:
    """Yield lines that are not ordinary documents."""
    deep = b'{"text": "a", "x": ' + b"[" * DEEP
    return {
        "nested lists": deep + b"\n",
        "closed nested lists": deep + b"]" * DEEP + b"}\n",
        "nested objects": b'{"text":' * DEEP + b"\n",
        "closed nested objects": b'{"text":' * DEEP + b"1" + b"}" * DEEP + b"\n",
        "zero bytes": b"\0" * 1000 + b"\n",
        "a zero byte in the text": b'{"text": "a\0b"}\n',
        "a spelled zero byte": b'{"text": "a\\u0000b"}\n' * 30,
        "a mark of order": b'\xef\xbb\xbf{"text": "a"}\n',
        "a mark of order, UTF-16": '{"text": "a"}\n'.encode("utf-16"),
        "not UTF-8": b'{"text": "\xff\xfe"}\n',
        "overlong": b'{"text": "\xc0\x80"}\n',
        "half a character": b'{"text": "\\ud800"}\n',
        "text null": b'{"text": null}\n',
        "text twice": b'{"text": "a", "text": "b"}\n',
        "text a number": b'{"text": 5}\n',
        "text a list": b'{"text": ["a"]}\n',
        "no text": b'{"tex": "a"}\n',
        "5000 digits": b'{"text": "a", "x": 1' + b"0" * 5000 + b"}\n",
        "a long number": b"1" + b"0" * 5000 + b"\n",
        "1e999": b'{"text": "a", "x": 1e999}\n',
        "terminal": json.dumps({"text": NASTY}).encode() + b"\n",
        "names for a terminal": json.dumps({NASTY: NASTY}).encode() + b"\n",
        "no line end": b'{"text": "a"}',
        "carriage returns": b'{"text": "a"}\r' * 20,
        "other line ends": '{"text": "a"}\u2028{"text": "b"}\n'.encode(),
        "100,000 keys": json.dumps({f"k{i}": i for i in range(DEEP)}).encode() + b"\n",
        "100,000 of one key": b"{" + b'"a": 1, ' * DEEP + b'"text": "a"}\n',
        "a long word": b'{"text": "' + b"x" * 100_000 + b'"}\n',
        "blanks": b'{"text": "' + b" " * 100_000 + b'"}\n',
        "letters that join": '{"text": "{}"}\n'.replace("{}", "e" + "\u0301" * 10_000).encode(),
        "special tokens": b'{"text": "</s><s><unk><|endoftext|>\\u2581"}\n' * 10,
    }


def _bomb(name: str, part: bytes, start: bytes = b"") -> bytes:
    """Return 1 GiB of ``part`` in few bytes: the compressed data is repeated 64 times."""
    pack = gzip.compress if name.endswith(".gz") else zstd
    return pack(start) + pack(part * ((16 << 20) // len(part))) * 64


def _holes(name: str, start: bytes) -> Change:
    """Write a document of 2 GiB without an end."""

    def change(folder: Path) -> None:
        with open(folder / "corpus" / name, "wb") as file:
            file.write(start)
            file.truncate(2 << 30)

    return change


_OPEN = b'{"text": "'
_ROW = b'{"text": "a"}\n'
_PACKED: dict[str, Change] = {
    **{
        f"1 GiB of {what}, {name}": _file(name, partial(_bomb, name, part, start))
        for name in ("b.jsonl.gz", "c.jsonl.zst")
        for what, part, start in (
            ("zeros", b"\0", b""),
            ("line ends", b"\n", b""),
            ("rows", _ROW, b""),
            ("one text", b"x", _OPEN),
            ("digits", b"1", b""),
            ("lists", b"[", b""),
            ("bad rows", b"{}\n", LINES),
        )
    },
    "a line without end": _holes("a.jsonl", _OPEN),
    "a text without end": _holes("e.txt", b"x"),
    "gzip: cut": _file("b.jsonl.gz", gzip.compress(LINES)[:-5]),
    "gzip: junk behind": _file("b.jsonl.gz", gzip.compress(LINES) + b"junk"),
    "gzip: CRC": _file("b.jsonl.gz", gzip.compress(LINES)[:-8] + bytes(8)),
    "gzip: twice": _file("b.jsonl.gz", gzip.compress(LINES) * 2),
    "gzip: nested": _file("b.jsonl.gz", gzip.compress(gzip.compress(LINES))),
    "gzip: zstd": _file("b.jsonl.gz", zstd(LINES)),
    "gzip: a long name": _file(
        "b.jsonl.gz", lambda: b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * (8 << 20)
    ),
    "zstd: cut": _file("c.jsonl.zst", zstd(LINES)[:-5]),
    "zstd: junk behind": _file("c.jsonl.zst", zstd(LINES) + b"junk"),
    "zstd: twice": _file("c.jsonl.zst", zstd(LINES) * 2),
    "zstd: nested": _file("c.jsonl.zst", zstd(zstd(LINES))),
    "zstd: gzip": _file("c.jsonl.zst", gzip.compress(LINES)),
    "zstd: a window of 2 GiB": _file(
        "c.jsonl.zst", lambda: b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x03\x00\x80\x00x" * 9
    ),
    "zstd: 2^63 bytes declared": _file(
        "c.jsonl.zst", lambda: b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 63) + b"\x01"
    ),
    "zstd: a skipped frame of 4 GiB": _file(
        "c.jsonl.zst", lambda: b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + zstd(LINES)
    ),
    "bzip2 under another name": _file("b.jsonl.gz", bz2.compress(LINES)),
    "xz under another name": _file("b.jsonl.gz", lzma.compress(LINES)),
}


def _columns() -> Iterator[tuple[str, Callable[[], bytes]]]:
    texts = pa.array(TEXTS)
    columns: dict[str, Any] = {
        "binary": texts.cast(pa.binary()),
        "large": texts.cast(pa.large_string()),
        "view": texts.cast(pa.string_view()),
        "dictionary": texts.dictionary_encode(),
        "numbers": pa.array(range(12)),
        "nulls": pa.nulls(12),
        "texts and nulls": pa.array([None, *TEXTS]),
        "only null texts": pa.nulls(12, pa.string()),
        "lists": pa.array([[text] for text in TEXTS]),
        "objects": pa.array([{"text": text} for text in TEXTS]),
        "maps": pa.array([[("a", text)] for text in TEXTS], pa.map_(pa.string(), pa.string())),
        "fixed": pa.array([b"abcd"] * 12, pa.binary(4)),
        "dates": pa.array(range(12), pa.date32()),
        "not UTF-8": pa.array([b"\xff\xfe"] * 12),
        "text that is not UTF-8": pa.array([b"\xff\xfe"] * 12).view(pa.string()),
        "zero bytes": pa.array(["\0" * 10] * 12),
        "empty": pa.array([""] * 12),
        "no rows": pa.array([], pa.string()),
        "terminal": pa.array([NASTY] * 12),
    }
    for name, column in columns.items():
        yield name, partial(parquet, column)
    for deep in (50, 500, 5000):
        yield f"lists {deep} deep", partial(_lists, deep)
    yield "another name", lambda: parquet(name=NASTY)
    yield "10,000 columns", _wide
    yield "a row group per row", lambda: parquet(row_group_size=1)
    for codec in ("none", "snappy", "gzip", "brotli", "lz4", "zstd"):
        yield f"of {codec}", partial(parquet, compression=codec)
    for codec in ("snappy", "zstd"):
        for name, size, rows, groups in (
            ("one text", 144 << 20, 1, 1),
            ("two texts", 144 << 20, 2, 1),
            ("texts", 1 << 16, 1 << 10, 1),
            ("row groups", 1 << 21, 1, 16),
        ):
            yield (
                f"{size * rows * groups >> 20} MiB in {name}, {codec}",
                partial(_large, codec, size, rows, groups),
            )
    for size, rows in ((1 << 10, 1 << 20), (1 << 19, 1 << 12), (1 << 22, 1 << 10)):
        yield (
            f"{rows} times a text of {size}",
            partial(_large, "zstd", size, rows, 1, dictionary=True),
        )


def _lists(deep: int) -> bytes:
    kind: pa.DataType = pa.string()
    for _ in range(deep):
        kind = pa.list_(kind)
    return parquet(pa.nulls(3, kind))


def _wide() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({f"c{i}": [1] for i in range(10_000)}), sink)
    return sink.getvalue()


def _large(codec: str, size: int, rows: int, groups: int, dictionary: bool = False) -> bytes:
    """Write ``rows`` texts of ``size`` letters in each of ``groups`` row groups."""
    text = pa.array(["x" * size])
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), text)
    if not dictionary:
        column = column.cast(pa.string())
    table = pa.table({"text": column})
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression=codec,
        use_dictionary=dictionary,
        dictionary_pagesize_limit=2 * size + 100,
        write_statistics=False,
    ) as writer:
        for _ in range(groups):
            writer.write_table(table)
    return sink.getvalue()
