"""Separators of documents: one end of text, a begin of text on request, and none that a document
spells."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pmp_ds.data.arrow_store import Store
from pmp_ds.data.manifest import SPLITS
from pmp_ds.errors import UserError
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.merge import merge_stores
from pmp_ds.prepare.packing import is_validation, pack_ref
from pmp_ds.prepare.prepare import prepare
from pmp_ds.prepare.statistics import inspect_store
from pmp_ds.prepare.summary import PrepareSummary
from pmp_ds.prepare.tokenizer import load_tokenizer
from pmp_ds.state.run_record import DataFacts
from tests.unit.prepare.conftest import make_texts

FAST = "gigatoken"
ENGINES = {
    "byte-bpe": FAST,
    "byte-bpe-bos": FAST,
    "unspecial-eos": FAST,
    "unigram": "tokenizers",
    "word-level": "tokenizers",
    "sentencepiece-bpe-add_dummy_prefix": FAST,
    "sentencepiece-unigram": "sentencepiece",
    "sentencepiece-bpe-user_defined_symbols": FAST,
    "trained": FAST,
    "tokenizer.json": FAST,
}
WITH_BOS = (
    "byte-bpe-bos",
    "sentencepiece-bpe-add_dummy_prefix",
    "sentencepiece-unigram",
    "trained",
)


@pytest.fixture
def write(tmp_path: Path):
    def write(texts: list[str]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return str(path)

    return write


def run(path: str, tokenizer_paths, kind: str, name: str = "out", **changes) -> PrepareSummary:
    tokenizer = None if kind == "trained" else str(tokenizer_paths[kind])
    settings: dict[str, Any] = {
        "input": (path,),
        "out": str(Path(path).parent / name),
        "tokenizer": tokenizer,
        "train_vocab_size": 400,
        "block_size": 2,
        "val_fraction": 0.2,
        "workers": 1,
    }
    return prepare(PrepareConfig(**(settings | changes)))


def blocks(store: Store, split: str) -> np.ndarray:
    return store.split(split).gather(np.arange(len(store.split(split))))


@pytest.mark.parametrize("kind", ENGINES)
def test_no_document_forges_a_special_token(kind: str, tokenizer_paths, trained, write, tmp_path):
    """Every special token, alone, first, inside, last and next to all others, on both engines."""
    if kind == "tokenizer.json":  # without a tokenizer_config.json
        shutil.copy(tokenizer_paths["byte-bpe"] / kind, tmp_path)
        tokenizer_paths = {kind: tmp_path / kind}
    tokenizer = trained if kind == "trained" else load_tokenizer(str(tokenizer_paths[kind]))
    names = [*tokenizer.special_tokens]
    forged = [form for n in names for form in (n, f"{n}tree", f"a{n}tree", f"a tree {n}")]
    path = write([*make_texts(60), *forged, "".join(names), " ".join(names) + "\n"])
    shards = []
    for engine in ("auto", "reference"):
        summary = run(path, tokenizer_paths, kind, engine, engine=engine)
        store = Store.open(summary.folder, verify=True)
        for split in SPLITS:
            found = blocks(store, split)
            entry = store.manifest["splits"][split]
            # A tail of one token, with blocks of two, is the last end of text.
            assert (found == store.eos_id).sum() + entry["dropped_tokens"] == entry["documents"]
            others = {*tokenizer.special_tokens.values()} - {store.eos_id}
            if kind in ("unigram", "word-level"):  # no byte fallback: unknown words are there
                others.remove(tokenizer.special_tokens["<unk>"])
            assert not others & {*np.unique(found).tolist()}
        shards.append([store.manifest["splits"][split]["shards"] for split in SPLITS])
        if engine == "auto":
            assert summary.manifest["tokenizer"]["engine"].startswith(ENGINES[kind])
    assert shards[0] == shards[1]


@pytest.mark.parametrize("kind", WITH_BOS)
def test_begin_of_text_leads_every_document(kind: str, tokenizer_paths, write):
    texts = [*make_texts(60), "it says <s> here"]
    path = write(texts)
    summary = run(path, tokenizer_paths, kind, bos="document")
    store = Store.open(summary.folder, verify=True)
    where = store.tokenizer_dir if kind == "trained" else tokenizer_paths[kind]
    tokenizer = load_tokenizer(str(where))
    assert store.bos_id == tokenizer.bos_id is not None
    for split in SPLITS:
        chosen = [t for t in texts if is_validation(t.encode(), 0.2) == (split == "validation")]
        ids = [ids.tolist() for ids in tokenizer.encode_batch(chosen)]
        expected, dropped = pack_ref(ids, 2, store.eos_id, store.bos_id)
        assert blocks(store, split).tolist() == expected
        assert store.manifest["splits"][split]["dropped_tokens"] == dropped
    slow = run(path, tokenizer_paths, kind, "slow", bos="document", engine="reference", workers=2)
    assert slow.manifest["dataset_id"] == store.dataset_id
    # A prompt of the released tokenizer begins as the documents do.
    reader = AutoTokenizer.from_pretrained(str(store.tokenizer_dir), local_files_only=True)
    assert reader("the tree").input_ids[0] == store.bos_id
    assert not [text for text in summary.warnings if "by default" in text]
    report = inspect_store(store, summary.folder.parent / "picture.png", samples=0)
    line = f"begin of text {store.bos_id} before, end of text {store.eos_id} after every document"
    assert line in report
    assert line in str(summary)
    assert DataFacts.of(store).bos_id == store.bos_id


def test_none_is_the_default_and_a_policy_of_its_own(tokenizer_paths, write):
    path = write(make_texts(60))
    kind = "byte-bpe-bos"
    plain = run(path, tokenizer_paths, kind)
    assert plain.manifest["bos_id"] is None
    assert plain.manifest["settings"]["bos"] == "none"
    assert "no begin of text, end of text" in str(plain)
    (warning,) = plain.warnings  # this tokenizer begins every text with one
    assert "puts the ids [1] before a text by default, the packed documents have []" in warning
    with pytest.raises(UserError, match="bos is 'none' there and 'document' now"):
        run(path, tokenizer_paths, kind, bos="document")
    other = run(path, tokenizer_paths, kind, "other", bos="document")
    assert other.manifest["dataset_id"] != plain.manifest["dataset_id"]
    with pytest.raises(UserError, match="bos_id is None and 1"):
        merge_stores(plain.folder.parent / "both", [plain.folder, other.folder])


def test_store_from_before_the_policy_is_reused(tokenizer_paths, write):
    path = write(make_texts(60))
    made = run(path, tokenizer_paths, "byte-bpe")
    manifest = json.loads((made.folder / "manifest.json").read_text())
    del manifest["settings"]["bos"], manifest["bos_id"]
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(path, tokenizer_paths, "byte-bpe").reused
    assert Store.open(made.folder, verify=True).bos_id is None


def test_tokenizers_that_cannot(tokenizer_paths, write, tmp_path: Path):
    path = write(make_texts(60))
    with pytest.raises(UserError, match=r"bos=document, but .*byte-bpe has no begin-of-text"):
        run(path, tokenizer_paths, "byte-bpe", bos="document")
    same = tmp_path / "same"
    shutil.copytree(tokenizer_paths["byte-bpe"], same)
    config = json.loads((same / "tokenizer_config.json").read_text())
    (same / "tokenizer_config.json").write_text(
        json.dumps(config | {"bos_token": config["eos_token"]})
    )
    with pytest.raises(UserError, match="begin and end of text are the same token 0"):
        run(path, {"same": same}, "same", bos="document")
    del config["eos_token"]
    (same / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tokenizer .*same has no end-of-text token.*eos_token"):
        run(path, {"same": same}, "same")
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "same"}  # nothing was begun


def test_merged_store_tells_a_run_its_sources(tokenizer_paths, write, tmp_path: Path):
    path = write(make_texts(60))
    for name in "ab":
        run(path, tokenizer_paths, "sentencepiece-unigram", name, bos="document")
    merged = merge_stores(tmp_path / "both", [tmp_path / "a", tmp_path / "b"])
    facts = DataFacts.of(merged)
    assert facts.sources == (path, path)
    assert facts.bos_id == 1
