"""Rows to token ids: both texts, special tokens, truncation."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from pmp_ds.glue.encode import encode
from pmp_ds.glue.read import Rows
from tests.helpers.glue import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def ids(tokenizer: PreTrainedTokenizerBase, *texts: str, max_length: int = 64) -> list[int]:
    [found] = encode(tokenizer, Rows([texts], np.zeros(1)), max_length)
    return found


def test_a_line_end_is_between_two_texts(tokenizer: PreTrainedTokenizerBase):
    assert tokenizer.decode(ids(tokenizer, "One text.")) == "One text."
    assert tokenizer.decode(ids(tokenizer, "One text.", "Another.")) == "One text.\nAnother."


def test_the_longer_text_is_cut_first(tokenizer: PreTrainedTokenizerBase):
    found = ids(tokenizer, "a" * 50, "bcd", max_length=10)
    assert len(found) == 10
    assert tokenizer.decode(found) == "aaaaaa\nbcd"
    assert tokenizer.decode(ids(tokenizer, "abcdef", max_length=4)) == "abcd"


def test_an_empty_row_has_one_token(tokenizer: PreTrainedTokenizerBase):
    assert ids(tokenizer, "") == [tokenizer.eos_token_id]


def test_rows_are_not_padded(tokenizer: PreTrainedTokenizerBase):
    rows = Rows([("abc",), ("a",)], np.zeros(2))
    assert [len(found) for found in encode(tokenizer, rows, 64)] == [3, 1]
