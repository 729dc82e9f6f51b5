"""Ranks share the check of a store, and all of them name the damage."""

import shutil
from pathlib import Path

import pytest

from pmp_ds import dist
from pmp_ds.data.arrow_store import Store
from pmp_ds.data.verified import check_together
from pmp_ds.errors import UserError
from tests.helpers.distributed import RankPool
from tests.helpers.stores import write_store

pytestmark = pytest.mark.distributed


def start(folders: list[str], memory: str) -> int | str:
    """Return the bytes that this rank read of its folder, or the error."""
    try:
        return check_together(Store.open(folders[dist.rank() % len(folders)]), Path(memory))
    except UserError as error:
        return str(error)


def test_ranks_share_a_store(ranks2: RankPool, tmp_path: Path):
    folder = write_store(tmp_path / "store", 0, 400, shard=100)
    size = sum(shard["bytes"] for shard in Store.open(folder).shards)
    memory = str(tmp_path / "verified.json")
    read = ranks2.run(start, [folder], memory)
    assert sum(read) == size
    assert min(read) > size / 4
    assert ranks2.run(start, [folder], memory) == [0, 0]
    shard = Path(folder, "train", "00003-000.arrow")
    shard.write_bytes(bytes([*shard.read_bytes()[:-50], *bytes(50)]))
    first, second = ranks2.run(start, [folder], memory)
    assert first == second
    assert f"data shard {shard} is damaged: its content changed" in first
    assert "\n" not in first


def test_a_copy_of_its_own_is_checked_whole(ranks2: RankPool, tmp_path: Path):
    """As on hosts with their own disks: damage to one copy does not hide behind the other."""
    folder = write_store(tmp_path / "store", 0, 400, shard=100)
    copy = str(shutil.copytree(folder, tmp_path / "copy"))
    size = sum(shard["bytes"] for shard in Store.open(folder).shards)
    memory = str(tmp_path / "verified.json")
    assert ranks2.run(start, [folder, copy], memory) == [size, size]
    assert ranks2.run(start, [folder, copy], memory) == [0, 0]
    for name in ("00000-000.arrow", "00001-000.arrow"):
        shard = Path(copy, "train", name)
        shard.write_bytes(bytes([*shard.read_bytes()[:-50], *bytes(50)]))
        first, second = ranks2.run(start, [folder, copy], memory)
        assert first == second
        assert f"data shard {shard} is damaged" in first
        shutil.copy(Path(folder, "train", name), shard)
