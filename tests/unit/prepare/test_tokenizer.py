"""Ids, special tokens as text, and the saved folder as AutoTokenizer reads it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from pmp_ds.errors import UserError
from pmp_ds.prepare.saved_tokenizer import count_mismatches, plain_reader
from pmp_ds.prepare.spm import fast_from_sentencepiece, parse_model
from pmp_ds.prepare.tokenizer import (
    MODEL_FILE,
    TrainedTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from tests.helpers.examples import examples

KINDS = (
    "byte-bpe",
    "byte-bpe-bos",
    "unspecial-eos",
    "unigram",
    "word-level",
    "sentencepiece-bpe-add_dummy_prefix",
    "sentencepiece-unigram",
    "sentencepiece-bpe-user_defined_symbols",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, trained: TrainedTokenizer) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    trained.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_spells_a_special_token(kind: str, tokenizer_paths: dict[str, Path]):
    tokenizer = load_tokenizer(str(tokenizer_paths[kind]))
    _check_special_tokens_are_text(tokenizer)


def test_no_text_spells_a_special_token_of_a_trained_tokenizer(trained: TrainedTokenizer):
    assert trained.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    _check_special_tokens_are_text(trained)
    (ids,) = trained.encode_batch(["</s><s> <unk>"])
    assert not {0, 1, 2} & set(ids.tolist())  # byte fallback: not even unknown


def _check_special_tokens_are_text(tokenizer) -> None:
    assert tokenizer.eos_id in tokenizer.special_tokens.values()
    names = list(tokenizer.special_tokens)
    unknown = tokenizer.special_tokens.get("<unk>")  # also stands for characters unheard of
    forbidden = set(tokenizer.special_tokens.values()) - {unknown}
    texts = [form for name in names for form in (name, f"a tree{name}of rain", f" {name} ", "x")]
    texts.append("".join(names))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert not forbidden & set(ids.tolist()), text
        assert len(ids) > 0, text


def test_spelled_end_of_text_decodes_to_itself(tokenizer_paths: dict[str, Path]):
    tokenizer = load_tokenizer(str(tokenizer_paths["byte-bpe"]))
    text = "one <|endoftext|> two<pad>"
    (ids,) = tokenizer.encode_batch([text])
    reader = FastTokenizer.from_file(str(tokenizer_paths["byte-bpe"] / "tokenizer.json"))
    assert reader.decode(ids.tolist(), skip_special_tokens=False) == text
    assert reader.encode(text).ids != ids.tolist()  # the plain library would have been fooled


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_gives_the_same_ids(
    kind: str, tokenizer_paths: dict[str, Path], texts: list[str], tmp_path: Path
):
    tokenizer = load_tokenizer(str(tokenizer_paths[kind]))
    tokenizer.save_pretrained(tmp_path)
    compared, other_ids, _ = count_mismatches(tokenizer, plain_reader(tmp_path), texts)
    assert compared == len(texts)
    assert other_ids == 0
    assert (tmp_path / MODEL_FILE).exists() == kind.startswith("sentencepiece")
    if (tmp_path / MODEL_FILE).exists():  # else llama.cpp's converter would guess
        spec = parse_model((tmp_path / MODEL_FILE).read_bytes()).normalizer_spec
        stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert stored["add_prefix_space"] == spec.add_dummy_prefix


def test_count_mismatches_counts(trained: TrainedTokenizer, texts, tokenizer_paths):
    other = tokenizer_paths["byte-bpe"]
    sample = [*texts[:10], "it says </s> here"]
    assert count_mismatches(trained, plain_reader(other), sample) == (10, 10, 10)


@pytest.mark.processes
def test_plain_process_reads_the_trained_tokenizer(
    saved: Path, trained: TrainedTokenizer, texts: list[str]
):
    """Without pmp_ds, and with the config.json of either model family, ids and text are exact."""
    sample = [*texts[:20], "  two  spaces\n\n\tand \u00e9\U0001f600\x00 \r\n ", "a", "\n", " "]
    script = (
        "import json, sys\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = [tokenizer.encode(t, add_special_tokens=False) for t in json.load(sys.stdin)]\n"
        "assert 'pmp_ds' not in sys.modules\n"
        "print(json.dumps([ids, [tokenizer.decode(i) for i in ids], tokenizer.eos_token_id]))\n"
    )
    expected = [ids.tolist() for ids in trained.encode_batch(sample)]
    for model_type in ("llama", "gpt2"):
        (saved / "config.json").write_text(json.dumps({"model_type": model_type}))
        output = subprocess.run(
            [sys.executable, "-c", script, str(saved)],
            input=json.dumps(sample),
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        assert json.loads(output.splitlines()[-1]) == [expected, sample, trained.eos_id]
    (saved / "config.json").unlink()


def test_trained_ids_are_those_of_sentencepiece(saved: Path, trained: TrainedTokenizer, texts):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(saved / MODEL_FILE))
    for text, ids in zip(texts, trained.encode_batch(texts), strict=True):
        assert processor.encode(text) == ids.tolist()


@examples(200)
@given(st.text(st.sampled_from(" \n=-#abtree0(.é\t"), max_size=60))
def test_conversion_is_exact_on_runs_and_ties(spm_and_fast, text: str):
    processor, fast = spm_and_fast
    assert fast.encode(text).ids == processor.encode(text)
    assert fast.decode(processor.encode(text), skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def spm_and_fast(saved: Path):
    model = (saved / MODEL_FILE).read_bytes()
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return processor, fast_from_sentencepiece(proto)


def test_training_is_deterministic_and_keeps_whitespace(texts, trained: TrainedTokenizer):
    again = train_tokenizer(texts, 400)
    assert again.fingerprint == trained.fingerprint
    assert train_tokenizer(texts, 401).fingerprint != trained.fingerprint
    pieces = trained._tokenizer.get_vocab()
    assert "\u2581\u2581\u2581\u2581" in pieces
    assert any(len(piece) > 1 and "\n" in piece for piece in pieces)


def test_training_reads_the_whole_of_long_documents():
    """Lines above sentencepiece's own limit, which it would skip, still train it."""
    line = "zebra quagga " * 2000
    tokenizer = train_tokenizer([line], 280)
    (ids,) = tokenizer.encode_batch(["zebra quagga"])
    assert len(ids) < len("zebra quagga")


@pytest.mark.parametrize(("vocab_size", "word"), [(300, "smaller"), (30000, "too high")])
def test_untrainable_vocabulary(vocab_size: int, word: str):
    text = "".join(chr(0x4E00 + i) for i in range(200)) * 3
    with pytest.raises(UserError, match=f"train_vocab_size={vocab_size}.*{word}"):
        train_tokenizer([text], vocab_size)


def test_fingerprint_depends_on_what_decides_ids(tokenizer_paths: dict[str, Path], tmp_path: Path):
    prints = {load_tokenizer(str(path)).fingerprint for path in tokenizer_paths.values()}
    assert len(prints) == len(tokenizer_paths)
    source = tokenizer_paths["byte-bpe"]
    load_tokenizer(str(source)).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).fingerprint == load_tokenizer(str(source)).fingerprint


def test_tokenizer_json_path(tokenizer_paths: dict[str, Path], tmp_path: Path):
    folder = tokenizer_paths["byte-bpe"]
    by_file = load_tokenizer(str(folder / "tokenizer.json"))
    assert by_file.fingerprint == load_tokenizer(str(folder)).fingerprint
    alone = tmp_path / "tokenizer.json"  # without a tokenizer_config.json
    alone.write_bytes((folder / "tokenizer.json").read_bytes())
    assert load_tokenizer(str(alone)).eos_id == by_file.eos_id


def test_truncation_and_padding_settings_are_ignored(tokenizer_paths, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    fast = FastTokenizer.from_file(str(tokenizer_paths["byte-bpe"] / "tokenizer.json"))
    fast.enable_truncation(4)
    fast.enable_padding(length=50)
    fast.save(str(path))
    short, long = load_tokenizer(str(path)).encode_batch(["a", "a b c d e f g h i j k l"])
    assert len(short) == 1
    assert len(long) > 4


def test_refuses_what_is_no_tokenizer(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(str(tmp_path))
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"no protobuf" * 100)
    with pytest.raises(UserError, match=r"broken\.model is not a sentencepiece model"):
        load_tokenizer(str(broken))


def test_refuses_a_tokenizer_without_end_of_text(tmp_path: Path, texts: list[str]):
    words = FastTokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "x"),
        vocab_size=60,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "x.model"))


def test_ids_are_integers_below_vocab_size(tokenizer_paths: dict[str, Path], texts: list[str]):
    for path in tokenizer_paths.values():
        tokenizer = load_tokenizer(str(path))
        for ids in tokenizer.encode_batch(texts[:5]):
            assert np.issubdtype(ids.dtype, np.integer)
            assert ids.max() < tokenizer.vocab_size
