"""Untrusted tickets with the right id: only a packed mask of plain shapes is accepted."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pmp_ds.errors import UserError
from pmp_ds.ticket.mask import ParamMask, pack
from pmp_ds.ticket.ticket import from_files, load_ticket
from pmp_ds.ticket.vault import _archive, open_sealed
from tests.helpers.crafted.kinds import identity, sealed
from tests.helpers.strangers import Bits, packed, ticket_files, write_ticket

SHAPES = {"w": (3, 5), "b": (8,)}
ONE_DIMENSION = "is uint8 of shape [1, 2], but 15 elements need uint8 of shape [2]"


def changed(bits: torch.Tensor) -> Bits:
    return packed(SHAPES) | {"w": bits}


BITS = {
    "int64": (changed(torch.full((2,), -256)), "the mask of 'w' is int64 of shape [2], but 15"),
    "bool": (changed(torch.ones(2, dtype=torch.bool)), "is bool of shape [2]"),
    "float": (changed(torch.ones(2)), "is float32 of shape [2]"),
    "short": (changed(torch.ones(1, dtype=torch.uint8)), "is uint8 of shape [1], but 15 elements"),
    "long": (changed(torch.ones(3, dtype=torch.uint8)), "is uint8 of shape [3]"),
    "empty": (changed(torch.ones(0, dtype=torch.uint8)), "is uint8 of shape [0]"),
    "two dimensions": (changed(torch.ones(1, 2, dtype=torch.uint8)), ONE_DIMENSION),
    "padding": (
        changed(torch.tensor([1, 128], dtype=torch.uint8)),
        "has ones after the last of its 15",
    ),
    "one more": (packed(SHAPES | {"x": (4,)}), "the mask of 'x' lacks a shape"),
    "one less": (packed({"b": (8,)}), "the mask of 'w' lacks bits"),
}

DIMENSIONS: dict[str, Any] = {
    "negative": [-3, -5],
    "bool": [True, 15],
    "text": ["15"],
    "float": [15.0],
    "nested": [[15]],
    "null": [None, 15],
    "huge": [1 << 72],
    "huge and empty": [0, 1 << 72],
    "product": [1 << 40, 1 << 40],
    "many": [1] * 100,
}


@pytest.mark.parametrize(("bits", "message"), BITS.values(), ids=BITS)
def test_bits(tmp_path: Path, bits: Bits, message: str) -> None:
    folder = write_ticket(tmp_path / "t", bits, SHAPES)
    with pytest.raises(UserError) as caught:
        load_ticket(folder)
    assert str(caught.value).startswith(f"the ticket at {folder} is damaged: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("shape", DIMENSIONS.values(), ids=DIMENSIONS)
def test_shapes(tmp_path: Path, shape: list[Any]) -> None:
    folder = write_ticket(tmp_path / "t", packed(SHAPES), SHAPES | {"w": shape})
    with pytest.raises(UserError, match="is damaged") as caught:
        load_ticket(folder)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "change",
    [
        {"density": "0.5"},
        {"density": None},
        {"density": 2.0},
        {"density": float("nan")},
        {"step": -1},
        {"step": True},
        {"stable": "yes"},
        {"source": None},
        {"score": 1},
        {"model_digest": 5},
        {"num_params": 24},
        {"num_kept": 1},
        {"parameters": []},
        {"parameters": {"w": 5}},
        {"id": None},
    ],
    ids=str,
)
def test_fields(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_ticket(tmp_path / "t", packed(SHAPES), SHAPES, **change)
    with pytest.raises(UserError, match="is damaged"):
        load_ticket(folder)


def test_the_same_ticket_unchanged_is_taken(tmp_path: Path) -> None:
    found = load_ticket(write_ticket(tmp_path / "t", packed(SHAPES), SHAPES))
    assert found.mask.num_kept == 8 + 4


def test_nothing_of_the_bits_is_said(tmp_path: Path) -> None:
    """The words are the same for the same kind, whatever the content."""
    said = set()
    for number, value in enumerate((-256, 77)):
        files = ticket_files(changed(torch.full((2,), value)), SHAPES)
        with pytest.raises(UserError) as caught:
            from_files(partial(_part, files), tmp_path)
        said.add(str(caught.value))
        assert number < 2
    assert len(said) == 1


def _part(files: dict[str, bytes], name: str, _: int) -> bytes:
    return files[name]


def test_a_sealed_one(tmp_path: Path) -> None:
    files = ticket_files(changed(torch.full((2,), -256)), SHAPES)
    (tmp_path / "t.age").write_bytes(sealed(_archive(files)))
    with pytest.raises(UserError, match=r"t\.age is damaged: the mask of 'w' is int64"):
        open_sealed(tmp_path / "t.age", [identity()])


def test_two_members_of_one_name(tmp_path: Path) -> None:
    """Readers of tar differ in which of them they take."""
    files = ticket_files(packed(SHAPES), SHAPES)
    one = _archive(files)
    content = one.rstrip(b"\0")
    content += b"\0" * (-len(content) % 512) + one
    (tmp_path / "t.age").write_bytes(sealed(content))
    with pytest.raises(UserError, match="contains two files named"):
        open_sealed(tmp_path / "t.age", [identity()])


def test_a_mask_in_memory() -> None:
    with pytest.raises(UserError, match="is int64"):
        ParamMask(bits={"w": torch.full((2,), -256)}, shapes={"w": (15,)})
    with pytest.raises(UserError, match="lacks bits"):
        ParamMask(bits={}, shapes={"w": (15,)})
    ParamMask(bits={"w": pack(torch.ones(15).bool())}, shapes={"w": (15,)})
