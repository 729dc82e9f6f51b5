"""A ticket among ranks: written from their pieces, read by each where it needs it."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from pmp_ds import dist
from pmp_ds.errors import UserError
from pmp_ds.ticket import shared, stored_bits
from pmp_ds.ticket.mask import pack
from pmp_ds.ticket.shared import Piece, SharedTicket, load_together
from pmp_ds.ticket.ticket import MASK_FILE, Origin, load_ticket

pytestmark = pytest.mark.distributed

SHAPES = {"w": (300, 70), "empty": (0,), "scalar": (), "b": (13,)}
ORIGIN = Origin(density=0.5, source="random", score=None, step=None, stable=True, model_digest="d")


def kept(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.rand(SHAPES[name], generator=generator).view(-1) < 0.5


def pieces() -> list[Piece]:
    """Uneven shares of every parameter, with borders inside bytes."""
    found, world, rank = [], dist.world_size(), dist.rank()
    for name in SHAPES:
        whole = kept(name)
        borders = [whole.numel() * i * i // (world * world) for i in range(world + 1)]
        low, high = borders[rank : rank + 2]
        if low < high:
            found.append(Piece(name, low, high - low, pack(whole[low:high])))
    return found


def drawn(chunk: int) -> SharedTicket:
    with mock.patch.object(shared, "_CHUNK", chunk):
        return SharedTicket(ORIGIN, SHAPES, pieces(), torch.device("cpu"))


def written(folder: str) -> tuple[bool, str]:
    with mock.patch.object(shared, "_CHUNK", 4096):
        ticket = drawn(4096)
        ticket.save(Path(folder))
        whole = ticket.gathered()
    same = all(whole.mask.full(name).view(-1).equal(kept(name)) for name in SHAPES)
    return same, whole.id


@pytest.mark.parametrize("world", [1, 2, 3])
def test_written_from_the_pieces_of_any_ranks(request, tmp_path, world):
    found = request.getfixturevalue(f"ranks{world}").run(written, str(tmp_path / "t"))
    ticket = load_ticket(tmp_path / "t")
    assert found == [(True, ticket.id)] * world
    assert all(ticket.mask.full(name).view(-1).equal(kept(name)) for name in SHAPES)


def refused(folder: str) -> str:
    """Nothing can be written there: every rank says so, and the collectives fit together."""
    ticket = drawn(4096)
    with pytest.raises(UserError) as caught:
        ticket.save(Path(folder))
    return f"{caught.value} {ticket.gathered().id}"


def test_a_folder_that_cannot_be_written(ranks2, tmp_path):
    (tmp_path / "file").write_text("")
    said = ranks2.run(refused, str(tmp_path / "file" / "t"))
    assert "cannot be written" in said[0]
    assert said[0] == said[1]


def bytes_read(folder: str) -> tuple[int, str, bool]:
    """Return the bytes of the mask that this rank reads for the last hundredth of a parameter."""
    sizes: list[int] = []
    true = os.preadv

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return true(fd, buffers, offset)

    with mock.patch.object(stored_bits, "CHUNK", 64), mock.patch.object(os, "preadv", counting):
        ticket = load_together(Path(folder), model_digest="d")
        part = ticket.mask.fragment("w", 20_000, 200)
        before = ticket.mask.num_kept_before("w", 20_000)
    whole = kept("w")
    right = part.equal(whole[20_000:20_200]) and before == int(whole[:20_000].sum())
    return (
        sum(sizes),
        ticket.id,
        right and ticket.mask.num_kept == sum(int(kept(name).sum()) for name in SHAPES),
    )


def test_other_ranks_read_what_they_need(ranks2, tmp_path):
    ranks2.run(written, str(tmp_path / "t"))
    (first, one, right), (second, other, also) = ranks2.run(bytes_read, str(tmp_path / "t"))
    assert right
    assert also
    assert one == other == load_ticket(tmp_path / "t").id
    assert first > 300 * 70 // 8
    assert second < 64 * 8


def bytes_after_the_first(folder: str) -> int:
    """Return the bytes read for a fragment and the ones before it, the second time."""
    sizes: list[int] = []
    true = os.preadv

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return true(fd, buffers, offset)

    with mock.patch.object(stored_bits, "CHUNK", 64), mock.patch.object(os, "preadv", counting):
        mask = load_together(Path(folder)).mask
        first = mask.fragment("w", 9_000, 3_000)
        sizes.clear()
        os.truncate(Path(folder) / MASK_FILE, 0)
        assert mask.fragment("w", 9_000, 3_000).equal(first)
        assert mask.num_kept_before("w", 12_000) - mask.num_kept_before("w", 9_000) == first.sum()
    return sum(sizes)


def test_a_rank_with_its_fragments_does_not_need_the_file(ranks1, tmp_path):
    """Every save counts them, also long after the start."""
    ranks1.run(written, str(tmp_path / "t"))
    assert ranks1.run(bytes_after_the_first, str(tmp_path / "t")) == [0]


def another_one(folders: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        load_together(Path(folders[dist.rank()]))
    return str(caught.value)


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(content)


def test_ranks_that_see_different_folders(ranks2, tmp_path):
    """Two machines with a folder of their own, which should be one."""
    folders = [str(tmp_path / name) for name in "ab"]
    for folder in folders:
        ranks2.run(written, folder)
    one_bit(tmp_path / "b" / MASK_FILE)
    said = ranks2.run(another_one, folders)
    assert all("rank 1 on" in text and "not the file that rank 0 read" in text for text in said)
    (tmp_path / "b" / MASK_FILE).unlink()
    said = ranks2.run(another_one, folders)
    assert all("mask.safetensors is missing" in text for text in said)
