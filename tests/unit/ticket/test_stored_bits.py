"""Packed bits in a file: the same as in memory, read only where they are needed."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pmp_ds.errors import UserError
from pmp_ds.foreign import ForeignError, MissingError
from pmp_ds.ticket import stored_bits
from pmp_ds.ticket.mask import ParamMask, pack
from pmp_ds.ticket.stored_bits import StoredBits
from pmp_ds.ticket.ticket import MASK_FILE, Ticket, load_ticket, save_ticket

SHAPES = {"w": (37, 21), "empty": (0, 4), "scalar": (), "b": (8,)}
MOST = 1 << 20


def mask() -> ParamMask:
    torch.manual_seed(0)
    bits = {name: pack(torch.rand(shape) < 0.6) for name, shape in SHAPES.items()}
    return ParamMask(bits=bits, shapes=SHAPES)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stored_bits, "CHUNK", 16)
    origin: dict[str, Any] = {"source": "random", "score": None, "step": None, "stable": True}
    ticket = Ticket(mask=mask(), density=0.6, model_digest="d", **origin)
    save_ticket(ticket, tmp_path / "t")
    assert load_ticket(tmp_path / "t").id == ticket.id
    return tmp_path / "t" / MASK_FILE


def test_every_range_is_as_in_memory(file: Path) -> None:
    held, stored = mask(), ParamMask(bits=StoredBits(file, MOST), shapes=SHAPES)
    assert list(stored.bits) == list(SHAPES)
    assert stored.num_kept == held.num_kept
    for name, shape in SHAPES.items():
        assert stored.bits[name].equal(held.bits[name])
        assert stored.full(name).equal(held.full(name))
        numel = math.prod(shape)
        for start in range(0, numel + 1, 5):
            assert stored.num_kept_before(name, start) == held.num_kept_before(name, start)
            for count in range(0, numel - start + 1, 11):
                part = held.fragment(name, start, count)
                assert stored.fragment(name, start, count).equal(part)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read."""
    sizes: list[int] = []
    true = os.preadv

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return true(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    return sizes


def test_only_the_chunks_of_a_fragment_are_read(file: Path, read: list[int]) -> None:
    whole = StoredBits(file, MOST)
    assert ParamMask(bits=whole, shapes=SHAPES).num_kept
    read.clear()
    bits = ParamMask(bits=StoredBits(file, MOST, whole.facts), shapes=SHAPES)
    ends = sum(read)  # the last chunk of each parameter, for the check of what follows its end
    assert ends < 16 * len(SHAPES)
    read.clear()
    bits.fragment("w", 8 * 20, 100)  # bytes 20 to 33
    assert sum(read) == 32
    read.clear()
    bits.num_kept_before("w", 8 * 40)
    assert sum(read) <= 32


def test_another_file_is_found_out_where_it_is_read(file: Path) -> None:
    whole = StoredBits(file, MOST)
    assert ParamMask(bits=whole, shapes=SHAPES).num_kept
    content = bytearray(file.read_bytes())
    content[content.index(bytes(mask().bits["w"].numpy())) + 50] ^= 1
    file.write_bytes(content)
    bits = ParamMask(bits=StoredBits(file, MOST, whole.facts), shapes=SHAPES)
    bits.fragment("w", 0, 300)
    with pytest.raises(UserError, match="is not the file that rank 0 read at the start"):
        bits.fragment("w", 0, 420)


def test_a_file_that_becomes_shorter(file: Path) -> None:
    bits = ParamMask(bits=StoredBits(file, MOST), shapes=SHAPES)
    os.truncate(file, file.stat().st_size - 30)
    with pytest.raises(UserError, match="cannot be read"):
        bits.full("w")


def test_what_is_no_mask_file(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="is missing"):
        StoredBits(tmp_path / "none", MOST)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ForeignError, match="not a regular file"):
        StoredBits(tmp_path / "pipe", MOST)
    (tmp_path / "long").write_bytes(bytes(100))
    with pytest.raises(ForeignError, match="longer than 50 bytes"):
        StoredBits(tmp_path / "long", 50)
    with pytest.raises(ForeignError, match="cannot be read"):
        StoredBits(tmp_path / "long", 100)
