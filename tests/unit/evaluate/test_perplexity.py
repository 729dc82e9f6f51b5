"""Loss and perplexity against the plain sum over tokens."""

import math
from pathlib import Path

import pytest
import torch

from pmp_ds.data.arrow_store import Store
from pmp_ds.errors import UserError
from pmp_ds.evaluate.perplexity import held_out, perplexity
from pmp_ds.evaluate.subject import Subject
from pmp_ds.prepare.tokenizer import train_tokenizer
from tests.helpers import tiny
from tests.helpers.stores import write_store as write_numbered
from tests.unit.evaluate.conftest import TEXT, write_store


def test_equals_the_sum_over_tokens(subject: Subject):
    blocks = tiny.batch(0, 5)
    logits = subject.model(input_ids=blocks).logits.double().log_softmax(-1)
    nats = -sum(
        logits[b, t, blocks[b, t + 1]].item() for b in range(5) for t in range(tiny.BLOCK - 1)
    )
    found = perplexity(subject.model, blocks, batch_size=2)  # the last batch is smaller
    assert found["tokens"] == 5 * (tiny.BLOCK - 1)
    assert found["loss"] == pytest.approx(nats / found["tokens"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / found["tokens"]), rel=1e-5)
    assert "bits_per_byte" not in found


def test_bits_per_byte_of_known_text(subject: Subject):
    ids = subject.tokenizer.encode(TEXT, add_special_tokens=False)
    blocks = torch.tensor([ids, ids])
    found = perplexity(subject.model, blocks, 2, subject.tokenizer)
    first = len(subject.tokenizer.decode(ids[:1]).encode())
    bits = found["loss"] * found["tokens"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / (2 * (len(TEXT.encode()) - first)))


def test_blocks_are_spread_over_the_split(tmp_path: Path):
    store = Store.open(write_numbered(tmp_path / "store", first=100, train=3, validation=8))
    assert held_out(store, "validation", 4)[:, 0].tolist() == [103, 105, 107, 109]
    assert held_out(store, "train", 50)[:, 0].tolist() == [100, 101, 102]


def test_vocabulary_must_be_the_models(tmp_path: Path, release: Path, subject: Subject):
    own = write_store(tmp_path / "own", release)
    subject.require_vocabulary(Store.open(own))
    large = write_store(tmp_path / "large", release, vocab=tiny.VOCAB + 1)
    with pytest.raises(UserError, match=r"vocabulary of 301 ids, the model .* one of 300"):
        subject.require_vocabulary(Store.open(large))
    train_tokenizer([TEXT[::-1]] * 20, tiny.VOCAB).save_pretrained(own / "tokenizer")
    with pytest.raises(UserError, match="was tokenized with another tokenizer"):
        subject.require_vocabulary(Store.open(own))
