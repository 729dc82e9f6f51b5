"""The documents of each file, and the messages about the rest."""

import gzip
import json
from pathlib import Path

import pytest

from pmp_ds.errors import UserError
from pmp_ds.prepare import jsonl
from pmp_ds.prepare.corpus import PYTHON, Rejects, Source, group_units
from pmp_ds.prepare.inputs import find_sources
from pmp_ds.prepare.readers import read_documents, read_texts


def read(path: Path, field: str = "text") -> tuple[list[str], Rejects]:
    rejects = Rejects()
    (source,) = find_sources([str(path)])
    return list(read_texts(source, field, rejects)), rejects


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path):
    for name in ("b.txt", "a/z.jsonl", "a/y.txt", "c.jsonl.gz", "ignored.md", "a/b/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [source.name for source in find_sources([f"{tmp_path}/"])]
    expected = ["a/b/c.txt", "a/y.txt", "a/z.jsonl", "b.txt", "c.jsonl.gz"]
    assert names == [f"{tmp_path}/{name}" for name in expected]


def test_text_file_is_one_document_exactly(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff one\r\n\ttwo é \n\n".encode())
    assert read(path)[0] == [" one\r\n\ttwo é \n\n"]  # all but the byte order mark


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    rows = ["first", "second\nline \u2028 é", " "]
    data = "\n".join([json.dumps({"body": text, "id": 1}) for text in rows] + ["", ""]).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    documents, rejects = read(path, "body")
    assert documents == rows[:2]
    assert (rejects.rows, rejects.empty, rejects.malformed) == (3, 1, 0)
    assert rejects.describe() == [f"1 x empty document (first: {path}:3)"]


def test_every_kind_of_bad_row_is_counted_with_its_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "fine"}'
    bad = {
        "not JSON": b'{"text": ',
        "not a JSON object": b'["text"]',
        "no field 'text'": b'{"body": "x"}',
        "field 'text' is not a string": b'{"text": 3}',
        "invalid UTF-8": b'{"text": "\xff"}',
        "half of a surrogate pair": b'{"text": "\\ud800"}',
    }
    path.write_bytes(b"\n".join([good, *bad.values(), bad["not JSON"], good]))
    documents, rejects = read(path)
    assert documents == ["fine", "fine"]
    assert (rejects.rows, rejects.malformed) == (9, 7)
    assert rejects.counts == {**dict.fromkeys(bad, 1), "not JSON": 2}
    assert rejects.examples["not JSON"] == f"{path}:2"
    assert rejects.examples["half of a surrogate pair"] == f"{path}:7"
    with pytest.raises(UserError, match=r"7 of 9 rows are malformed.*a\.jsonl:2"):
        rejects.check()


ODD_LINES = (
    b'{"text": "a"}',
    b'{"text": "a\\u00e9\\ud83d\\ude00\\n"}',
    b'{"te\\u0078t": "a"}',
    b'{"text": "2020-01-01"}',
    b'{"text": "a", "x": [[{}], NaN, 1e999]}',
    b'{"text": 1, "text": "a"}',
    b'{"text": "a", "text": 1}',
    b'{"text": null}',
    b'{"x": {"text": "a"}}',
    b'{"text": ["a"]}',
    b'{"text": "\\udc00"}',
    b'{"text": "a\x00b"}',
    b'{"text": "a", "x": "\xff"}',
    b'{"text": "a\tb"}',
    b'{"text": "\\u0000"}',
    b'{"text": "a", "x": 01}',
    b'{"text": "a",}',
    b'{"text": "a"}\x00}',
    b'{"text": "a"} //}',
    b'{"text": "a"}{"text": "b"}',
    b'{"text": "a"},{"text": "b"}',
    b'{"text":\n"a"}',
    b'{"text": "a"}{"text": "b"}\n{"text":\n"c"}',
    b'{"text": "\\x41"}',
    b'{"text": "a"}\r',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "\xef\xbb\xbfa"}',
    b"{}",
    b'{"text": "\\u2003\\u001c"}',
    b'{"text": ""}',
    b"",
    b"{'text': 'a'}",
    b'{"text": "a" "x": 1}',
)


@pytest.mark.parametrize("line", ODD_LINES)
def test_many_lines_at_once_are_the_lines_one_by_one(tmp_path: Path, line: bytes, monkeypatch):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good", "id": 1}'
    path.write_bytes(b"\n".join([good, line, good]))
    together = read(path)
    monkeypatch.setattr(jsonl, "parse_chunk", lambda *_: None)
    assert together == read(path)


def test_plain_lines_are_parsed_at_once(monkeypatch, tmp_path: Path):
    """Chunks of any size end at line ends."""
    rows = [f"row {i} é\n" for i in range(50)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"id": i, "text": row}) for i, row in enumerate(rows)))
    monkeypatch.setattr(jsonl, "_parse_line", None)
    for size in (1, 7, 100, 10_000):
        monkeypatch.setattr(jsonl, "_CHUNK_BYTES", size)
        assert read(path)[0] == rows


def test_invalid_text_file_names_the_line(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthree \xff\n")
    documents, rejects = read(path)
    assert documents == []
    assert rejects.examples == {"invalid UTF-8": f"{path}:3"}


def test_one_percent_malformed_is_the_limit():
    rejects = Rejects(rows=200)
    for line in (1, 2):
        rejects.add("not JSON", f"f:{line}")
        rejects.check()
    rejects.add("not JSON", "f:3")
    with pytest.raises(UserError, match="3 of 200 rows"):
        rejects.check()


def test_progress_adds_up_to_the_file_size(tmp_path: Path):
    for name, compress in (("a.jsonl", bytes), ("b.jsonl.gz", gzip.compress)):
        path = tmp_path / name
        row = json.dumps({"text": "word " * 200}).encode() + b"\n"
        path.write_bytes(compress(row * 2000))
        (source,) = find_sources([str(path)])
        seen: list[int] = []
        assert len(list(read_documents(source, "text", Rejects(), seen.append))) == 2000
        assert sum(seen) == source.num_bytes == path.stat().st_size
    assert len(seen) >= 1


def test_unusable_inputs_are_named(tmp_path: Path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.txt").write_text("x")
    for given, message in (
        (["none"], "input none does not exist"),
        ([str(tmp_path / "a.csv")], "a.csv is not a .txt"),
        ([str(tmp_path / "empty")], "empty contains no .txt"),
        ([str(tmp_path), str(tmp_path / "t.txt")], "twice"),
        ([PYTHON, PYTHON], "twice"),
    ):
        with pytest.raises(UserError, match=message):
            find_sources(given)


def test_damaged_gzip_is_named(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "fine"}\n' * 1000)
    for data in (whole[: len(whole) // 2], b"no gzip"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
            read(path)


def test_links_in_the_standard_library_are_left_out(tmp_path, monkeypatch):
    """Debian links one module to another, and one to /etc."""
    (tmp_path / "lib/pydoc_data").mkdir(parents=True)
    (tmp_path / "etc.py").write_text("elsewhere = 1")
    for name in ("a.py", "b.py", "pydoc_data/topics.py"):
        (tmp_path / "lib" / name).write_text("here = 1")
    (tmp_path / "lib/again.py").symlink_to("a.py")
    (tmp_path / "lib/etc.py").symlink_to(tmp_path / "etc.py")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    names = [source.name for source in find_sources([PYTHON])]
    assert names == ["python:topics", "python:a.py", "python:b.py"]


def test_embedded_corpus_is_the_interpreters_own():
    sources = find_sources([PYTHON])
    assert sources == find_sources([PYTHON])
    names = [source.name for source in sources]
    assert names[0] == "python:topics"
    assert {"python:json/decoder.py", "python:abc.py"} <= set(names)
    assert names[1:] == sorted(names[1:])
    skipped = ("test/", "idlelib/", "site-packages/", "__pycache__/", "/test", "/tests/")
    assert not [n for n in names if n.startswith(tuple(f"python:{s}" for s in skipped[:4]))]
    topics = list(read_texts(sources[0], "text", Rejects()))
    assert len(topics) > 50
    assert sum(len(t) for t in topics) > 300_000
    assert any('The "with" statement' in text for text in topics)


def test_units_group_consecutive_small_files():
    sizes = [3, 3, 3, 5, 20, 1, 1, 9]
    sources = [
        Source(given="d", name=f"d/{i}.txt", path=Path(f"d/{i}.txt"), kind="text", num_bytes=size)
        for i, size in enumerate(sizes)
    ]
    units = group_units(sources, unit_bytes=10)
    assert [[s.num_bytes for s in unit.sources] for unit in units] == [
        [3, 3, 3],
        [5],
        [20],
        [1, 1],
        [9],
    ]
    assert [unit.index for unit in units] == [0, 1, 2, 3, 4]
