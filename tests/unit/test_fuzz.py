"""The parsers that `make fuzz` tests: good bytes are read, altered ones are read or refused."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmp_ds.operate.backup_file import archived
from pmp_ds.ticket import vault
from tests.helpers.crafted import tensors
from tests.helpers.examples import examples
from tests.helpers.fuzz import PARSERS, one

BATCH = pa.record_batch({"a": pa.array([1, 2])}).serialize()
GOOD = {
    "json": b'{"date": "d", "lineage": "l", "kind": "final", "updates": 4, "weights": "w",'
    b' "released": "r", "dtype": "bf16", "reason": null}',
    "yaml": b"train: {lr: 1e-4, steps: [1, 2]}\nrun: &a {name: x}\nmore: *a\n",
    "rows": b'{"text": "a"}\n{"text": "b"}',
    "line": b'{"text": "a"}',
    "batch": pa.ipc.read_message(BATCH).metadata.to_pybytes(),
    "archive": vault._archive({"ticket.json": b"{}", "mask.safetensors": b"x"}),
    "backup": archived("x", {"data.json": b"{}"}),
    "tensors": tensors.file({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"ab"),
}


@pytest.mark.parametrize("name", PARSERS)
def test_good_bytes_are_read(name: str) -> None:
    parse, _ = PARSERS[name]
    assert parse(GOOD[name]) not in (None, {}, [])


@examples(100)
@given(st.data())
def test_altered_bytes_are_read_or_refused(data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(PARSERS) - 1))
    content = bytearray([number]) + GOOD[list(PARSERS)[number]]
    for _ in range(data.draw(st.integers(1, 8))):
        start = data.draw(st.integers(1, len(content)))
        content[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    one(bytes(content))


@examples(100)
@given(st.binary())
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    one(content)
