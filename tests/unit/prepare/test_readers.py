"""Inputs that are cheap to make and costly to read are refused at once, with little read."""

import gzip
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pmp_ds.errors import UserError
from pmp_ds.prepare import jsonl, parquet, rows
from pmp_ds.prepare.corpus import Rejects, Source
from pmp_ds.prepare.inputs import find_sources
from pmp_ds.prepare.readers import read_documents
from tests.helpers.faults import seen

ROW = b'{"text": "a"}\n'


def read(path: Path) -> list[bytes]:
    (source,) = find_sources([str(path)])
    return list(read_documents(source, "text", Rejects(max_malformed=1.0)))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    return f"error: {caught.value}"


def packed(path: Path, content: bytes) -> Path:
    """Return ``content``, compressed as the name of the file says."""
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(content, 9))
    elif path.name.endswith(".zst"):
        path.write_bytes(pa.compress(content, codec="zstd", asbytes=True))
    else:
        path.write_bytes(content)
    return path


def repeated(path: Path, text: str, rows: int) -> Path:
    """Return a Parquet file with ``text`` once, in a dictionary, and that many rows of it."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd")
    return path


@pytest.fixture(autouse=True)
def _little_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_FREE_BYTES", 1 << 16)
    monkeypatch.setattr(jsonl, "_CHUNK_BYTES", 1 << 14)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("part", [b"\n", ROW, b"x", b"\0", b"{}\n"], ids=repr)
def test_packed_to_nothing(tmp_path: Path, suffix: str, part: bytes) -> None:
    path = packed(tmp_path / f"a{suffix}", part * (8_000_000 // len(part)))
    seen("packed to nothing", 1, refusal(path))


def test_parquet_packed_to_nothing(tmp_path: Path) -> None:
    seen("packed to nothing", 1, refusal(repeated(tmp_path / "a.parquet", "x" * 5000, 10_000)))
    column = pa.array(["x" * 10_000_000])
    pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet", compression="zstd")
    seen("packed to nothing", 1, refusal(tmp_path / "b.parquet"))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_text_that_is_packed_well_is_read(tmp_path: Path, suffix: str) -> None:
    """A hundred documents ten times: 20 times shorter when compressed."""
    rows = b"".join(b'{"text": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(100))
    assert len(read(packed(tmp_path / f"a{suffix}", rows * 10))) == 1000


def test_repeated_texts_of_a_parquet_file_are_read(tmp_path: Path) -> None:
    assert read(repeated(tmp_path / "a.parquet", "x" * 50, 1000)) == [b"x" * 50] * 1000


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_document_without_end(tmp_path: Path, name: str) -> None:
    """Of several GiB that take no room on the disk."""
    path = tmp_path / name
    path.write_bytes(b'{"text": "')
    os.truncate(path, 4 << 30)
    seen("endless document", 1, refusal(path))


def test_a_part_that_begins_in_a_line_without_end(tmp_path: Path) -> None:
    """A file of several GiB is read in parts, each from its first line end on."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x")
    os.truncate(path, 4 << 30)
    (source,) = find_sources([str(path)])
    part = replace(source, part=1, num_parts=2, first_byte=1 << 20, num_bytes=1 << 20)
    with pytest.raises(UserError, match="is too long: the line around byte 1,048,576, but"):
        list(read_documents(part, "text", Rejects()))


def test_a_row_group_of_one_endless_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [os.urandom(50_000).hex()]}), path, compression="none")
    assert len(read(path)) == 1
    monkeypatch.setattr(parquet, "LONGEST", 1 << 16)
    assert "is too long: row group 0 has 1 documents, but a document may have at" in refusal(path)


def test_lines_of_blanks_are_counted(tmp_path: Path) -> None:
    """Where a bad row stands is right behind a chunk of nothing."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * 40_000 + b"no JSON\n" + ROW)
    rejects = Rejects(max_malformed=1.0)
    (source,) = find_sources([str(path)])
    assert isinstance(source, Source)
    assert list(read_documents(source, "text", rejects)) == [b"a"]
    assert rejects.examples == {"not JSON": f"{path}:40001"}


def test_a_schema_of_many_columns_is_told_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({f"column {i}": [1] for i in range(3000)}), path)
    assert len(refusal(path)) < 500
