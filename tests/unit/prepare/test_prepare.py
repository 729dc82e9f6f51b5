"""End to end in one process: the content of the store, refusals, leftovers."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from pmp_ds.data.arrow_store import Store
from pmp_ds.data.manifest import SPLITS, read_manifest
from pmp_ds.errors import UserError
from pmp_ds.prepare import corpus as corpus_module
from pmp_ds.prepare import encoder as encoder_module
from pmp_ds.prepare import planning, sample, saved_tokenizer
from pmp_ds.prepare import units as units_module
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.packing import is_validation, pack_ref
from pmp_ds.prepare.prepare import prepare
from pmp_ds.prepare.tokenizer import load_tokenizer
from pmp_ds.prepare.units import unigram_cross_entropy
from tests.unit.prepare.conftest import make_texts


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = make_texts(200)
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts[1:]))
    return folder


def config(corpus: Path, **changes) -> PrepareConfig:
    settings: dict[str, Any] = {
        "input": (str(corpus),),
        "out": str(corpus.parent / "out"),
        "train_vocab_size": 400,
        "block_size": 16,
        "val_fraction": 0.1,
    }
    return PrepareConfig(**(settings | changes))


def read_all(folder: Path) -> dict[str, list[list[int]]]:
    store = Store.open(folder, verify=True)
    return {s: store.split(s).gather(np.arange(len(store.split(s)))).tolist() for s in SPLITS}


def test_blocks_are_the_documents_in_order(corpus: Path):
    summary = prepare(config(corpus))
    tokenizer = load_tokenizer(str(summary.folder / "tokenizer"))
    documents = make_texts(200)
    found = read_all(summary.folder)
    for split in SPLITS:
        chosen = [t for t in documents if is_validation(t.encode(), 0.1) == (split == "validation")]
        ids = [tokenizer.encode_batch([text])[0].tolist() for text in chosen]
        blocks, dropped = pack_ref(ids, 16, tokenizer.eos_id)
        assert found[split] == blocks
        entry = summary.manifest["splits"][split]
        assert (entry["documents"], entry["dropped_tokens"]) == (len(chosen), dropped)
    assert summary.tokens == 16 * sum(len(blocks) for blocks in found.values())
    assert not summary.reused


def test_ids_of_a_named_tokenizer_and_special_text(corpus: Path, tokenizer_paths):
    """A document that spells the end of text adds no boundary."""
    forged = "one <|endoftext|> two"
    (corpus / "c.txt").write_text(forged)
    summary = prepare(config(corpus, tokenizer=str(tokenizer_paths["byte-bpe"])))
    store = Store.open(summary.folder)
    boundaries = sum(
        row.count(store.eos_id) for rows in read_all(summary.folder).values() for row in rows
    )
    assert boundaries <= 201
    kept = sum(len(store.split(s)) for s in SPLITS) * 16
    dropped = sum(store.manifest["splits"][s]["dropped_tokens"] for s in SPLITS)
    tokenizer = load_tokenizer(str(tokenizer_paths["byte-bpe"]))
    lengths = [len(ids) + 1 for ids in tokenizer.encode_batch([*make_texts(200), forged])]
    assert kept + dropped == sum(lengths)
    assert store.tokenizer_fingerprint == tokenizer.fingerprint


def test_copies_of_a_document_share_a_split(corpus: Path):
    (corpus / "copy.jsonl").write_bytes((corpus / "b.jsonl").read_bytes())
    summary = prepare(config(corpus))
    held_out = [t for t in make_texts(200)[1:] if is_validation(t.encode(), 0.1)]
    first = is_validation(make_texts(1)[0].encode(), 0.1)
    assert summary.manifest["splits"]["validation"]["documents"] == 2 * len(held_out) + first


def test_units_and_shards(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    """Small units and shards: more files, the same rows but for the tails of the units."""
    whole = prepare(config(corpus, out=str(corpus.parent / "whole")))
    monkeypatch.setattr(units_module, "SHARD_BLOCKS", 50)
    prepare(config(corpus))
    assert read_all(corpus.parent / "out") == read_all(whole.folder)
    shards = Store.open(corpus.parent / "out").manifest["splits"]["train"]["shards"]
    assert [s["rows"] for s in shards[:-1]] == [50] * (len(shards) - 1)
    assert len(shards) > 5

    monkeypatch.setattr(corpus_module, "_MIN_UNIT_BYTES", (corpus / "b.jsonl").stat().st_size)
    split = prepare(config(corpus, out=str(corpus.parent / "split")))
    files = [s["file"] for s in split.manifest["splits"]["train"]["shards"]]
    assert files[0] == "train/00000-000.arrow"
    assert files[1] == "train/00001-000.arrow"
    assert datasets.load_from_disk(str(split.folder))["train"].num_rows == split.blocks["train"]


def test_same_input_same_bytes(corpus: Path):
    summaries = [prepare(config(corpus, out=str(corpus.parent / name))) for name in "xy"]
    assert summaries[0].manifest == summaries[1].manifest
    other = prepare(config(corpus, out=str(corpus.parent / "z"), block_size=8))
    assert other.manifest["dataset_id"] != summaries[0].manifest["dataset_id"]


def test_complete_store_is_reused(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    first = prepare(config(corpus))
    monkeypatch.setattr(sample, "read_documents", None)  # nothing is read again
    monkeypatch.setattr(sample, "read_texts", None)
    monkeypatch.setattr(units_module, "read_documents", None)
    again = prepare(config(corpus))
    assert again.reused
    assert again.manifest == first.manifest
    assert "already complete" in str(again)
    (first.folder / first.manifest["splits"]["train"]["shards"][0]["file"]).unlink()
    with pytest.raises(UserError, match="is missing"):
        prepare(config(corpus))


def test_another_store_is_refused_by_name(corpus: Path, tokenizer_paths):
    prepare(config(corpus))
    before = read_all(corpus.parent / "out")
    for changes, names in (
        ({"block_size": 32}, "block_size is 16 there and 32 now"),
        ({"train_vocab_size": 420}, "tokenizer is"),
        ({"tokenizer": str(tokenizer_paths["byte-bpe"])}, "tokenizer is"),
        ({"val_fraction": 0.2}, "val_fraction is 0.1 there and 0.2 now"),
        ({"input": (str(corpus / "b.jsonl"),)}, "input is"),
    ):
        with pytest.raises(UserError, match=f"contains another store.*{names}.*another out"):
            prepare(config(corpus, **changes))
    (corpus / "c.txt").write_text("a new file")
    with pytest.raises(UserError, match="input is"):
        prepare(config(corpus))
    assert read_all(corpus.parent / "out") == before


def test_unknown_folder_is_left_alone(corpus: Path):
    out = corpus.parent / "out"
    out.mkdir()
    prepare(config(corpus))  # an empty one is fine
    for folder in (corpus.parent / "full", corpus.parent / "out2.incomplete"):
        folder.mkdir()
        (folder / "thesis.doc").write_text("x")
    for name, message in (("full", "not a packed store"), ("out2", "thesis.doc")):
        with pytest.raises(UserError, match=message):
            prepare(config(corpus, out=str(corpus.parent / name)))
    assert (corpus.parent / "full" / "thesis.doc").exists()
    assert (corpus.parent / "out2.incomplete" / "thesis.doc").exists()


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "contains no document with text"),
        ([{"text": "  "}], {}, "contains no document with text"),
        ([{"body": "x"}], {}, r"1 of 1 rows are malformed.*no field 'text'.*text_field"),
        (
            [{"text": t} for t in make_texts(40)],
            {"block_size": 100_000},
            "the train split .* is empty: .*block_size=100000",
        ),
        (
            [{"text": t} for t in make_texts(40)],
            {"val_fraction": 1e-9},
            "the validation split .* is empty: its 0 documents .*raise val_fraction",
        ),
        ([{"text": t} for t in make_texts(40)], {"train_vocab_size": 50_000}, "too high"),
    ],
)
def test_unusable_corpus_leaves_nothing(tmp_path: Path, rows, changes, message: str):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(UserError, match=message):
        prepare(config(path, **{"input": (str(path),), **changes}))
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_few_bad_rows_are_reported(corpus: Path):
    with open(corpus / "b.jsonl", "ab") as file:
        file.write(b'\n{"text": ""}\n{"text": "\xff"}\n')
    summary = prepare(config(corpus))
    line = len(make_texts(200)) + 1
    assert f"1 x invalid UTF-8 (first: {corpus}/b.jsonl:{line})" in str(summary)
    assert f"1 x empty document (first: {corpus}/b.jsonl:{line - 1})" in str(summary)


@pytest.mark.processes
def test_killed_run_leaves_no_store_and_can_be_repeated(corpus: Path):
    script = (
        "import os, signal, sys\n"
        "from pmp_ds.prepare.config import PrepareConfig\n"
        "from pmp_ds.prepare import complete, prepare as module\n"
        "def killed(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "complete.write_manifest = killed\n"
        "module.prepare(PrepareConfig(input=(sys.argv[1],), out=sys.argv[2], block_size=16,\n"
        "                             train_vocab_size=400, val_fraction=0.1))\n"
    )
    out = corpus.parent / "out"
    done = subprocess.run(
        [sys.executable, "-c", script, str(corpus), str(out)], check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert list(Path(f"{out}.incomplete").glob("train/*.arrow"))
    prepare(config(corpus))
    reference = prepare(config(corpus, out=str(corpus.parent / "reference")))
    assert read_all(out) == read_all(reference.folder)
    assert {p.name for p in corpus.parent.iterdir()} == {"corpus", "out", "reference"}


def test_unigram_cross_entropy_by_hand():
    train = np.array([2, 0, 1, 1])  # smoothed 3 1 2 2 of 8
    validation = np.array([1, 1, 0, 2])
    expected = -(math.log(3 / 8) + math.log(1 / 8) + 2 * math.log(2 / 8)) / 4
    assert unigram_cross_entropy(train, validation) == pytest.approx(expected, rel=1e-12)


def test_stored_unigram_cross_entropy_counts_predicted_tokens(corpus: Path):
    store = Store.open(prepare(config(corpus)).folder)
    rows = read_all(store.folder)
    counts = np.bincount(np.ravel(rows["train"]), minlength=store.vocab_size) + 1
    targets = np.array(rows["validation"])[:, 1:].ravel()
    expected = -np.log(counts / counts.sum())[targets].mean()
    assert store.unigram_cross_entropy == pytest.approx(expected, rel=1e-12)


def test_tokenizer_is_trained_on_the_train_split_within_its_budget(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []
    original = planning.train_tokenizer

    def spy(texts, vocab_size):
        seen[:] = texts
        return original(seen, vocab_size)

    monkeypatch.setattr(planning, "train_tokenizer", spy)
    prepare(config(corpus))
    assert seen == [t for t in make_texts(200) if not is_validation(t.encode(), 0.1)]
    total = sum(p.stat().st_size for p in corpus.iterdir())
    monkeypatch.setattr(sample, "TRAINING_BYTES", total // 4)
    prepare(config(corpus, out=str(corpus.parent / "small")))
    assert total / 5 < sum(len(t.encode()) for t in seen) < total / 3


def test_foreign_model_that_transformers_reads_differently_is_a_warning(
    corpus: Path, tokenizer_paths, monkeypatch: pytest.MonkeyPatch
):
    path = str(tokenizer_paths["sentencepiece-unigram"])
    monkeypatch.setattr(saved_tokenizer, "count_mismatches", lambda *_: (9, 3, 0))
    summary = prepare(config(corpus, tokenizer=path))
    assert "3 of 9 sampled documents" in summary.warnings[0]
    assert "warning:" in str(summary)
    with pytest.raises(UserError, match="bug"):
        prepare(config(corpus, out=str(corpus.parent / "other")))


def test_uint32_above_65536_ids(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(units_module, "token_dtype", lambda _: np.dtype(np.uint32))
    wide = prepare(config(corpus))
    monkeypatch.undo()
    narrow = prepare(config(corpus, out=str(corpus.parent / "narrow")))
    assert wide.manifest["dtype"] == "uint32"
    assert read_all(wide.folder) == read_all(narrow.folder)
    assert read_manifest(narrow.folder)["dtype"] == "uint16"


def test_nothing_of_an_engine_that_errs_is_kept(
    corpus: Path, tokenizer_paths, monkeypatch: pytest.MonkeyPatch
):
    """A run packs with the fast engine and is stopped; the next one finds that its ids are
    wrong, repacks everything with the reference and says so."""
    settings = config(corpus, tokenizer=str(tokenizer_paths["byte-bpe"]), workers=1)
    correct = prepare(dataclasses.replace(settings, out=settings.out + "2", engine="reference"))
    packed: list[str] = []
    pack_unit = units_module.pack_unit

    def spy(job, *rest):
        packed.append(job.encoder.spec.engine.split()[0])
        return pack_unit(job, *rest)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pmp_ds.prepare.workers.pack_unit", spy)
    with monkeypatch.context() as patch:
        patch.setattr("pmp_ds.prepare.complete.write_manifest", no_space)
        with pytest.raises(UserError, match="No space left"):
            prepare(settings)

    def encode_batch(documents: list[bytes], *, parallel: bool) -> Any:
        ends = np.cumsum([0, *map(len, documents)])
        data = np.full(ends[-1], 7, np.uint32)
        offsets, content = SimpleNamespace(data=ends), SimpleNamespace(data=data)
        return SimpleNamespace(layout=SimpleNamespace(offsets=offsets, content=content))

    wrong = SimpleNamespace(encode_batch=encode_batch)
    monkeypatch.setattr(encoder_module, "_load_fast", lambda _: wrong)
    found = prepare(settings)
    assert packed == ["gigatoken", "tokenizers"]
    assert "gigatoken gives other ids" in found.warnings[0]
    for key in ("dataset_id", "splits", "tokenizer"):
        assert found.manifest[key] == correct.manifest[key]
