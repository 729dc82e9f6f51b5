"""Merging and inspecting stores."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from pmp_ds.data.arrow_store import Store
from pmp_ds.data.manifest import SPLITS
from pmp_ds.errors import UserError
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.merge import merge_stores
from pmp_ds.prepare.prepare import prepare
from pmp_ds.prepare.statistics import inspect_store, split_statistics
from pmp_ds.prepare.units import unigram_cross_entropy
from pmp_ds.release.tokenizer_files import TOKENIZER_FILES, copy_tokenizer
from pmp_ds.state.run_record import DataFacts
from tests.unit.prepare.conftest import make_texts


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("stores")
    tokenizer = None
    for name, texts in (("a", make_texts(60)), ("b", make_texts(150)[60:])):
        path = root / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        prepare(
            PrepareConfig(
                input=(str(path),),
                out=str(root / name),
                train_vocab_size=400,
                block_size=16,
                val_fraction=0.2,
                tokenizer=tokenizer,
            )
        )
        tokenizer = str(root / "a" / "tokenizer")
    return root / "a", root / "b"


def rows(store: Store, split: str) -> np.ndarray:
    return store.split(split).gather(np.arange(len(store.split(split))))


def test_merged_store_is_both_in_order(two, tmp_path: Path):
    merged = merge_stores(tmp_path / "both", two)
    merged.verify()
    stores = [Store.open(folder) for folder in two]
    for split in SPLITS:
        expected = np.concatenate([rows(store, split) for store in stores])
        assert np.array_equal(rows(merged, split), expected)
        shard = merged.manifest["splits"][split]["shards"][0]
        assert (merged.folder / shard["file"]).stat().st_nlink > 1  # no copy
    loaded = datasets.load_from_disk(str(merged.folder))
    assert loaded["train"].num_rows == len(merged.split("train"))
    counts = [
        np.bincount(part.reshape(-1), minlength=merged.vocab_size)
        for part in (rows(merged, "train"), rows(merged, "validation")[:, 1:])
    ]
    assert merged.unigram_cross_entropy == pytest.approx(unigram_cross_entropy(*counts), rel=1e-12)
    assert merged.manifest["rows"]["read"] == 150
    assert DataFacts.of(merged).sources == (f"{two[0]}.jsonl", f"{two[1]}.jsonl")  # it trains
    assert [path.name for path in tmp_path.iterdir()] == ["both"]


def test_a_tokenizer_of_several_chat_templates(tmp_path: Path, tokenizer_paths):
    """`transformers` saves all but one in a folder below; stores and runs keep it whole."""
    given = AutoTokenizer.from_pretrained(str(tokenizer_paths["byte-bpe"]))
    given.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    given.save_pretrained(str(tmp_path / "given"))
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": f"{name} {text}"}) for text in make_texts(60))
        )
        prepare(
            PrepareConfig(
                input=(str(tmp_path / f"{name}.jsonl"),),
                out=str(tmp_path / name),
                block_size=16,
                val_fraction=0.2,
                tokenizer=str(tmp_path / "given"),
            )
        )
    merged = merge_stores(tmp_path / "both", [tmp_path / "a", tmp_path / "b"])
    saved = AutoTokenizer.from_pretrained(str(merged.tokenizer_dir))
    assert saved.chat_template == given.chat_template
    second = merged.tokenizer_dir / "additional_chat_templates" / "tool_use.jinja"
    second.unlink()  # a link: the other stores keep theirs
    with pytest.raises(UserError, match=r"tool_use\.jinja is missing"):
        merged.check_facts()
    (tmp_path / "release").mkdir()
    copy_tokenizer(tmp_path / "a" / "tokenizer", tmp_path / "release")
    assert {p.name for p in (tmp_path / "release").iterdir()} <= set(TOKENIZER_FILES)


def test_what_cannot_be_merged(two, tmp_path: Path, tokenizer_paths):
    source = tmp_path / "c.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in make_texts(60)))
    other = prepare(
        PrepareConfig(
            input=(str(source),),
            out=str(tmp_path / "c"),
            block_size=8,
            val_fraction=0.2,
            tokenizer=str(tokenizer_paths["byte-bpe"]),
        )
    ).folder
    for folders, message in (
        ([two[0], other], "block_size is 16 and 8.*the tokenizer is \\w{12} and"),
        ([two[0], two[0]], "each once"),
        ([two[0]], "two or more"),
        ([two[0], tmp_path / "none"], "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            merge_stores(tmp_path / "out", folders)
    with pytest.raises(UserError, match="exists"):
        merge_stores(two[0], two)
    assert not (tmp_path / "out.incomplete").exists()


def test_lengths_are_those_of_the_documents(two, tmp_path: Path):
    store = Store.open(two[0])
    for split in SPLITS:
        found = split_statistics(store, split)
        stream = rows(store, split).reshape(-1).tolist()
        expected, length = [], 0
        for token in stream:
            length += 1
            if token == store.eos_id:
                expected.append(length)
                length = 0
        assert found.lengths.tolist() == expected
        assert found.distinct_tokens == len(set(stream))
    report = inspect_store(store, tmp_path / "x.png", samples=2)
    assert "the tree" in report or "rain" in report
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_lengths_end_with_the_unit(two, tmp_path: Path):
    """The document cut off at the end of a unit does not run on into the next store's first."""
    merged = merge_stores(tmp_path / "both", two)
    lengths = [split_statistics(Store.open(f), "train").lengths for f in two]
    assert np.array_equal(split_statistics(merged, "train").lengths, np.concatenate(lengths))
