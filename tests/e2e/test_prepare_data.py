"""launcher/prepare_data.py as its users run it."""

import gzip
import json
import time
from pathlib import Path

import datasets
import pytest

from pmp_ds.data.arrow_store import Store
from tests.helpers.commands import Done, call, ok
from tests.unit.prepare.conftest import make_texts

pytestmark = pytest.mark.e2e


def prepare(cwd: Path, *arguments: str) -> Done:
    return call("prepare_data.py", *arguments, cwd=cwd)


def prepare_ok(cwd: Path, *arguments: str) -> str:
    return ok(prepare(cwd, *arguments)).stdout


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = make_texts(300)
    (tmp_path / "books" / "old").mkdir(parents=True)
    for i, text in enumerate(texts[:20]):
        (tmp_path / "books" / ("old" if i % 2 else "") / f"{i}.txt").write_text(text)
    rows = [json.dumps({"body": text}) for text in texts[20:]]
    (tmp_path / "a.jsonl").write_text("\n".join(rows[:150]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows[150:]).encode()))
    return tmp_path


SMALL = ("--train_vocab_size", "400", "--block_size", "32", "--val_fraction", "0.1")


def test_files_to_a_store_and_again_and_verify(corpus: Path):
    arguments = (
        "--input",
        "books",
        "a.jsonl",
        "b.jsonl.gz",
        "--text_field",
        "body",
        "--out",
        "packed/x",
        *SMALL,
    )
    output = prepare_ok(corpus, *arguments)
    assert "prepared: packed/x" in output
    assert "documents      300 (0 malformed" in output
    assert "400 ids" in output
    store = Store.open(corpus / "packed" / "x", verify=True)
    assert f"train          {len(store.split('train')):,} blocks of 32" in output
    loaded = datasets.load_from_disk(str(store.folder))
    assert loaded["train"].num_rows == len(store.split("train"))

    before = {p: p.stat().st_mtime_ns for p in store.folder.rglob("*")}
    assert "already complete: packed/x" in prepare_ok(corpus, *arguments)
    assert before == {p: p.stat().st_mtime_ns for p in store.folder.rglob("*")}
    refused = prepare(corpus, *arguments, "--block_size", "64")
    assert refused.returncode == 1
    assert "block_size is 32 there and 64 now" in refused.stderr

    assert prepare_ok(corpus, "verify", "packed/x").startswith("ok: packed/x: ")
    shard = store.folder / store.manifest["splits"]["train"]["shards"][0]["file"]
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    damaged = prepare(corpus, "verify", "packed/x")
    assert damaged.returncode == 1
    assert damaged.stderr.startswith(f"error: data shard packed/x/train/{shard.name} is damaged")
    assert damaged.stderr.count("\n") == 1


def test_settings_from_a_file(corpus: Path):
    (corpus / "settings.yaml").write_text(
        "input: [books]\nout: from_file\ntrain_vocab_size: 400\nblock_size: 32\n"
        "val_fraction: 2e-1\n"
    )
    prepare_ok(corpus, "--config", "settings.yaml", "--block_size", "16")
    assert Store.open(corpus / "from_file").block_size == 16


def test_saved_tokenizer_serves_the_next_corpus(corpus: Path):
    prepare_ok(corpus, "--input", "books", "--out", "one", *SMALL)
    prepare_ok(
        corpus,
        "--input",
        "a.jsonl",
        "--text_field",
        "body",
        "--out",
        "two",
        "--tokenizer",
        "one/tokenizer",
        "--block_size",
        "32",
        "--val_fraction",
        "0.1",
    )
    one, two = Store.open(corpus / "one"), Store.open(corpus / "two")
    assert one.tokenizer_fingerprint == two.tokenizer_fingerprint
    model = prepare_ok(
        corpus,
        "--input",
        "a.jsonl",
        "--text_field",
        "body",
        "--out",
        "three",
        "--tokenizer",
        "one/tokenizer/tokenizer.model",
        "--block_size",
        "32",
        "--val_fraction",
        "0.1",
    )
    assert "sentencepiece, 400 ids" in model
    assert "warning" not in model
    shards = [Store.open(corpus / name).manifest["splits"] for name in ("two", "three")]
    assert shards[0] == shards[1]  # sentencepiece and its conversion agree to the byte


def test_embedded_corpus_within_a_minute(tmp_path: Path):
    start = time.monotonic()
    prepare_ok(tmp_path, "--out", "demo", "--train_vocab_size", "2048")
    assert time.monotonic() - start < 60
    store = Store.open(tmp_path / "demo", verify=True)
    assert len(store.split("train")) > 5000
    assert len(store.split("validation")) > 20
    assert 5.0 < store.unigram_cross_entropy < 7.5


def test_merge_and_inspect(corpus: Path):
    named = ("--tokenizer", "one/tokenizer", "--block_size", "32", "--val_fraction", "0.1")
    prepare_ok(corpus, "--input", "books", "--out", "one", *SMALL)
    prepare_ok(corpus, "--input", "a.jsonl", "--text_field", "body", "--out", "two", *named)
    assert "merged: both: " in prepare_ok(corpus, "merge", "both", "one", "two")
    assert prepare_ok(corpus, "verify", "both").startswith("ok: both: 4 shards")
    report = prepare_ok(corpus, "inspect", "both", "--samples", "1")
    assert "tokens per document: mean" in report
    assert "--- train block 0:" in report
    assert (corpus / "both" / "document_lengths.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "none.txt"), "error: input none.txt does not exist"),
        (("--inputs", "a"), "error: unknown flag --inputs (did you mean --input?)"),
        (("--block_size", "x"), "error: block_size: expected int, got x"),
        (("--val_fraction", "1.5"), "error: val_fraction=1.5 must be in (0, 1)"),
        (("--tokenizer", "nowhere"), "error: tokenizer nowhere does not exist"),
        (("--input", "a.jsonl"), "error: 150 of 150 rows are malformed"),
        (("verify", "nowhere"), "error: the data folder nowhere does not exist"),
        (("verify",), "error: DIR is missing; see --help"),
        (("inspect", "nowhere"), "error: the data folder nowhere does not exist"),
        (("merge", "x", "nowhere"), "error: merge takes two or more"),
    ],
)
def test_mistakes_are_one_line(corpus: Path, arguments: tuple[str, ...], message: str):
    before = sorted(corpus.rglob("*"))
    done = prepare(corpus, *arguments)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if " train tokenizer: " not in line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(message)
    assert sorted(corpus.rglob("*")) == before


def test_help_shows_examples(tmp_path: Path):
    text = prepare_ok(tmp_path, "--help")
    assert "pmp-ds prepare-data verify" in text
    assert "Tokens per block" in text
    assert "default: 256" in text
