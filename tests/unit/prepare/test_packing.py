"""Blocks against the token-by-token reference, the split by hash, the number of bytes per id."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmp_ds.prepare import packing
from pmp_ds.prepare.packing import Packer, is_validation, pack_ref, token_dtype

U16 = np.dtype(np.uint16)


def test_by_hand():
    packer = Packer(4, eos_id=0, dtype=U16)
    packer.add([np.array([1, 2]), np.array([], int), np.array([3, 4, 5, 6, 7])])
    blocks, dropped = packer.finish()
    assert blocks.tolist() == [[1, 2, 0, 0], [3, 4, 5, 6]]
    assert dropped == 2  # 7 and its EOS
    assert blocks.dtype == np.uint16


def test_begin_of_text_by_hand():
    packer = Packer(4, eos_id=0, dtype=U16, bos_id=9)
    packer.add([np.array([1, 2]), np.array([], int), np.array([3])])
    blocks, dropped = packer.finish()
    assert blocks.tolist() == [[9, 1, 2, 0], [9, 0, 9, 3]]
    assert dropped == 1


@given(
    documents=st.lists(st.lists(st.integers(1, 60000), max_size=30), max_size=30),
    block_size=st.integers(2, 9),
    flush=st.integers(1, 50),
    bos_id=st.none() | st.just(60001),
)
def test_equals_reference_however_it_is_fed(documents, block_size: int, flush: int, bos_id):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_FLUSH_TOKENS", flush)
        packer = Packer(block_size, eos_id=0, dtype=U16, bos_id=bos_id)
        parts = [packer.add([np.array(ids, np.int32)]) for ids in documents]
        last, dropped = packer.finish()
    found = np.concatenate([*parts, last]).tolist()
    assert (found, dropped) == pack_ref(documents, block_size, 0, bos_id)


@given(
    documents=st.lists(st.lists(st.integers(1, 60000), max_size=30), max_size=30),
    block_size=st.integers(2, 40),
)
def test_every_token_and_every_eos_is_kept_in_order(documents, block_size: int):
    packer = Packer(block_size, eos_id=0, dtype=U16)
    parts = [packer.add([np.array(ids, np.int64)]) for ids in documents]
    last, dropped = packer.finish()
    packed = np.concatenate([*parts, last])
    stream = [token for ids in documents for token in [*ids, 0]]
    assert dropped == len(stream) % block_size
    assert packed.reshape(-1).tolist() == stream[: len(stream) - dropped]
    assert packed.shape[1] == block_size


def test_finish_starts_over():
    packer = Packer(2, eos_id=9, dtype=U16)
    packer.add([np.array([1, 2])])
    assert packer.finish()[1] == 1
    blocks, dropped = packer.finish()
    assert blocks.shape == (0, 2)
    assert dropped == 0


def test_split_depends_on_the_text_and_the_share_alone():
    texts = [f"document {i}".encode() for i in range(4000)]
    chosen = [is_validation(text, 0.1) for text in texts]
    assert 0.08 < np.mean(chosen) < 0.12
    assert chosen == [is_validation(text, 0.1) for text in texts]
    # A larger share only adds documents.
    assert all(is_validation(t, 0.2) for t, c in zip(texts, chosen, strict=True) if c)


def test_dtype():
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32
