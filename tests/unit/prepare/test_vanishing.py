"""No document of an input is silently lost or counted twice."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pmp_ds.engine.objective import NextToken
from pmp_ds.errors import UserError
from pmp_ds.prepare import readers
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import Rejects
from pmp_ds.prepare.inputs import find_sources
from pmp_ds.prepare.prepare import prepare
from pmp_ds.prepare.tokenizer import load_tokenizer
from tests.helpers.faults import seen
from tests.unit.prepare.conftest import make_texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("one")
    return folder


def names(given: object) -> tuple[list[str], list[str]]:
    """Return the files read of an input, and the notes."""
    notes: list[str] = []
    return [source.name for source in find_sources([str(given)], None, notes)], notes


def refusal(*given: object) -> str:
    with pytest.raises(UserError) as caught:
        find_sources([str(one) for one in given])
    return f"error: {caught.value}"


def test_linked_folders_are_entered(folder: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.txt").write_text("two")
    (folder / "link").symlink_to(tmp_path / "other")
    assert names(folder) == ([f"{folder}/link/b.txt", f"{folder}/sub/a.txt"], [])


@pytest.mark.parametrize("target", [".", "sub"])
def test_a_folder_reached_twice(folder: Path, target: str):
    (folder / "loop").symlink_to(folder / target)
    words = refusal(folder)
    if target == ".":
        seen("link back", 1, words)
    assert "twice" in words


def test_a_file_reached_twice(folder: Path, tmp_path: Path):
    os.link(folder / "sub" / "a.txt", folder / "hard.txt")
    assert "twice" in refusal(folder)
    (folder / "hard.txt").unlink()
    assert "twice" in refusal(folder, folder / "sub" / "a.txt")
    assert "twice" in refusal(folder, f"{folder}/**/*.txt")
    (folder / "soft.txt").symlink_to(folder / "sub" / "a.txt")
    assert "twice" in refusal(folder)


def test_a_link_to_nothing(folder: Path):
    (folder / "b.txt").symlink_to(folder / "gone.txt")
    assert "b.txt is a link to nothing" in refusal(folder)


def test_hidden_and_other_files_are_counted(folder: Path):
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("x")
    (folder / "._a.txt").write_text("x")
    read, (hidden,) = names(folder)
    assert read == [f"{folder}/sub/a.txt"]
    seen("hidden files", 0, hidden)
    for name in ("a.csv", "sub/b.txt.gz"):
        (folder / name).write_text("x")
    read, (_, others) = names(folder)
    assert read == [f"{folder}/sub/a.txt"]
    seen("other files", 0, others)
    assert names(f"{folder}/.ipynb_checkpoints/*.txt")[1] == [], "asked for"
    (folder / "sub" / "a.txt").unlink()
    assert "contains no .txt" in (words := refusal(folder))
    assert "2 of other types" in words


def test_a_folder_by_url(folder: Path):
    (folder / "._a.txt").write_text("x")
    (folder / "a.csv").write_text("x")
    read, notes = names(f"file://{folder}")
    assert [Path(name).name for name in read] == ["a.txt"]
    assert "1 hidden" in notes[0]
    assert "1 of other types" in notes[1]


def test_the_summary_says_what_was_left_out(tmp_path: Path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = "\n".join(json.dumps({"text": text}) for text in make_texts(200))
    (folder / "a.jsonl").write_text(lines)
    config = PrepareConfig(
        input=(str(folder),),
        out=str(tmp_path / "a"),
        train_vocab_size=400,
        block_size=16,
        val_fraction=0.1,
    )
    plain = prepare(config)
    (folder / "._a.jsonl").write_text(lines)
    summary = prepare(PrepareConfig(**{**vars(config), "out": str(tmp_path / "b")}))
    assert "warning: input" in str(summary)
    assert "left out 1 hidden (first: ._a.jsonl" in str(summary)
    assert summary.manifest["dataset_id"] == plain.manifest["dataset_id"]


KINDS = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_parquet_text_in_every_form(kind: pa.DataType, tmp_path: Path):
    path = tmp_path / "a.parquet"
    texts = pa.array(["one", "two", None, "one"], pa.string()).cast(kind)
    pq.write_table(pa.table({"text": texts}), path)
    rejects = Rejects(max_malformed=0.0)
    (source,) = find_sources([str(path)])
    assert list(readers.read_documents(source, "text", rejects)) == [b"one", b"two", b"one"]
    assert (rejects.rows, rejects.empty, rejects.malformed) == (4, 1, 0)


def test_nulls_alone(tmp_path: Path):
    path, lines = tmp_path / "a.parquet", tmp_path / "a.jsonl"
    pq.write_table(pa.table({"text": pa.nulls(2)}), path)
    lines.write_text('{"text": null}\n{"text": "x"}\n')
    rejects = Rejects(max_malformed=0.0)
    found = [
        list(readers.read_documents(s, "text", rejects)) for s in find_sources([str(tmp_path)])
    ]
    assert found == [[b"x"], []]
    assert (rejects.rows, rejects.empty, rejects.malformed) == (4, 3, 0)


def test_a_file_that_changes(folder: Path):
    path = folder / "a.jsonl"
    path.write_text('{"text": "x"}\n')
    (source,) = find_sources([str(path)])
    with path.open("a") as file:
        file.write('{"text": "y"}\n')
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError) as caught:
        list(readers.read_documents(source, "text", Rejects()))
    seen("growing file", 1, f"error: {caught.value}")


def test_utf16_is_named(folder: Path):
    (folder / "sub" / "a.txt").write_text("one", encoding="utf-16")
    (source,) = find_sources([str(folder)])
    rejects = Rejects(max_malformed=1.0)
    assert list(readers.read_documents(source, "text", rejects)) == []
    assert list(rejects.counts) == ["UTF-16, not UTF-8"]


def _changed(source: Path, folder: Path, **model: object) -> Path:
    """A copy of a tokenizer with other settings of its model."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= model
    path.write_text(json.dumps(content))
    return folder


def test_a_tokenizer_that_draws(tokenizer_paths: dict[str, Path], tmp_path: Path):
    byte_bpe = tokenizer_paths["byte-bpe"]
    load_tokenizer(str(_changed(byte_bpe, tmp_path / "none", dropout=0.0)))
    folder = _changed(byte_bpe, tmp_path / "some", dropout=0.1)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    seen("random tokenizer", 1, f"error: {caught.value}")
    _changed(byte_bpe, folder := tmp_path / "sampling")
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"sp_model_kwargs": {"enable_sampling": True}}
    config.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"enable_sampling=True.*tokenizer_config\.json"):
        load_tokenizer(str(folder))


def test_a_document_without_a_token(tokenizer_paths: dict[str, Path], tmp_path: Path):
    """A normalizer may drop all of a text: it is counted, and no end of text is packed alone."""
    tokenizer = _changed(tokenizer_paths["byte-bpe"], tmp_path / "tokenizer")
    path = tokenizer / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "zzz"}, "content": ""}
    path.write_text(json.dumps(content))
    texts = make_texts(200)
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for text in texts for t in (text, "zzz"))
    )
    summary = prepare(
        PrepareConfig(
            input=(str(tmp_path / "a.jsonl"),),
            out=str(tmp_path / "out"),
            block_size=16,
            tokenizer=str(tokenizer),
            val_fraction=0.1,
        )
    )
    assert summary.manifest["rows"]["empty"] == 200
    assert "200 x empty document (first: no token for 'zzz')" in str(summary)
    assert sum(split["documents"] for split in summary.manifest["splits"].values()) == 200


def test_a_block_of_separators_is_no_loss_of_zero():
    """Stores made before may hold one: it counts like a block of one text."""
    logits = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    batch = torch.tensor([[3, 3, 3, 3], [1, 3, 2, 5]])
    apart, plain = NextToken(3).losses(logits, batch), NextToken().losses(logits, batch)
    assert apart[0] == plain[0] > 0
    assert apart[1] != plain[1]
