"""The fast engine gives the reference's ids or is not used; marked text never reaches it."""

import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmp_ds.errors import UserError
from pmp_ds.prepare import encoder as module
from pmp_ds.prepare.encoder import Encoder, choose_engine
from pmp_ds.prepare.tokenizer import TrainedTokenizer, load_tokenizer
from tests.helpers.examples import examples

pytest.importorskip("gigatoken")

FAST = (
    "byte-bpe",
    "byte-bpe-bos",
    "unspecial-eos",
    "sentencepiece-bpe-add_dummy_prefix",
    "sentencepiece-bpe-user_defined_symbols",
)


def same(found, expected) -> bool:
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


def encode(encoder: Encoder, texts):
    return encoder.encode_batch([text.encode() for text in texts])


@pytest.mark.parametrize("kind", FAST)
def test_fast_engine_is_chosen_and_equal(kind: str, tokenizer_paths, texts):
    tokenizer = load_tokenizer(str(tokenizer_paths[kind]))
    chosen, warning = choose_engine(tokenizer.encoder, texts)
    spec = chosen.spec
    if spec.fast is None:  # allowed, never silent
        assert warning
        assert "slower" in warning
        pytest.skip(warning)
    encoder = Encoder(pickle.loads(pickle.dumps(spec)))
    names = [*tokenizer.special_tokens, *spec.marked]
    sample = [*texts, *names, *(f"a tree{name}of rain" for name in names), "".join(names)]
    assert same(encode(encoder, sample), tokenizer.encode_batch(sample))
    forbidden = set(tokenizer.special_tokens.values()) - {tokenizer.special_tokens.get("<unk>")}
    assert not forbidden & {int(i) for ids in encode(encoder, sample) for i in ids}


def test_trained_tokenizer_uses_the_fast_engine(trained: TrainedTokenizer, texts):
    encoder, warning = choose_engine(trained.encoder, texts)
    assert warning is None
    assert encoder.spec.engine.startswith("gigatoken 0.")
    assert encoder.without_fast().spec.engine.startswith("tokenizers ")


@pytest.fixture(scope="module")
def encoder(trained: TrainedTokenizer) -> Encoder:
    return Encoder(trained.encoder.spec)


@examples(200)
@given(st.lists(st.text(max_size=40), max_size=4))
def test_any_text(encoder: Encoder, texts: list[str]):
    texts = [text for text in texts if text and not any("\ud800" <= c <= "\udfff" for c in text)]
    assert same(encode(encoder, texts), encoder.reference(texts))


def test_engine_that_differs_on_the_sample_is_not_used(trained: TrainedTokenizer, monkeypatch):
    class Wrong:
        def encode_batch(self, texts, **_):
            raise RuntimeError("cannot do this\nat all")

    monkeypatch.setattr(module, "_load_fast", lambda _: Wrong())
    encoder, warning = choose_engine(Encoder(trained.encoder.spec), ["x"])
    assert encoder.spec.fast is None
    assert warning is not None
    assert "cannot read this tokenizer (cannot do this)" in warning
    monkeypatch.undo()
    other = dataclasses.replace(trained.encoder.spec, model=_reversed_merges(trained))
    encoder, warning = choose_engine(Encoder(other), ["the tree of a river"])
    assert encoder.spec.fast is None
    assert warning is not None
    assert "gives other ids on" in warning


def test_missing_engine_is_a_warning(trained: TrainedTokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder, warning = choose_engine(Encoder(trained.encoder.spec), ["x"])
    assert encoder.spec.engine.startswith("tokenizers")
    assert "gigatoken is missing" in str(warning)


def test_difference_behind_the_sample_stops(trained: TrainedTokenizer):
    spec = dataclasses.replace(trained.encoder.spec, model=_reversed_merges(trained))
    with pytest.raises(UserError, match="engine: reference"):
        encode(Encoder(spec), ["the tree of a river and stone"])


def _reversed_merges(trained: TrainedTokenizer) -> bytes:
    import json

    description = json.loads(trained.encoder.spec.model)
    description["model"]["merges"] = []
    return json.dumps(description).encode()


@pytest.mark.processes
def test_imports_neither_torch_nor_transformers():
    program = "import sys, pmp_ds.prepare.encoder\nsys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
