"""A start reads only files that no earlier start read or that changed since, counted by the
system."""

import json
import os
import re
from pathlib import Path

import pytest

from pmp_ds.data.arrow_store import Store
from pmp_ds.data.mixed_store import open_data
from pmp_ds.data.verified import check_together
from pmp_ds.errors import UserError
from tests.helpers.stores import write_store

SIZE = 200_000  # bytes of a shard: far more than manifest, tokenizer and marks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of train, one of validation."""
    rows = SIZE // 16
    return Path(write_store(tmp_path / "store", 0, 2 * rows, validation=rows, shard=rows))


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "verified.json"


def read_of(setting: Path | dict[str, float], memory: Path) -> int:
    """Return the number of shards that a start reads whole: as it says, and as the system
    counted."""
    data = open_data(str(setting) if isinstance(setting, Path) else setting)
    before = _read_by_process()
    said = check_together(data, memory)
    found = _read_by_process() - before
    assert 0 <= found - said < SIZE / 2
    return round(said / SIZE)


def _read_by_process() -> int:
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def change(path: Path, *, keep_time: bool) -> None:
    """Flip a bit of the last token, by writing into the same file."""
    facts = path.stat()
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_the_second_start_reads_no_shard(folder: Path, memory: Path):
    assert read_of(folder, memory) == 3
    assert read_of(folder, memory) == 0


def test_a_changed_time_is_read_again(folder: Path, memory: Path):
    read_of(folder, memory)
    os.utime(folder / "train" / "00001-000.arrow", ns=(1, 1))
    assert read_of(folder, memory) == 1
    assert read_of(folder, memory) == 0


def test_a_file_put_in_its_place_is_read_again(folder: Path, memory: Path):
    """With equal size and time, its inode differs."""
    read_of(folder, memory)
    path = folder / "train" / "00001-000.arrow"
    facts, content = path.stat(), path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    other.replace(path)
    assert read_of(folder, memory) == 1


def test_a_shard_that_changed_is_named(folder: Path, memory: Path):
    read_of(folder, memory)
    kept = memory.read_bytes()
    change(folder / "train" / "00001-000.arrow", keep_time=False)
    with pytest.raises(UserError, match=r"00001-000\.arrow is damaged: its content changed"):
        read_of(folder, memory)
    assert memory.read_bytes() == kept


def test_verify_reads_every_byte(folder: Path, memory: Path):
    """It finds damage that neither size nor time reveals."""
    read_of(folder, memory)
    change(folder / "validation" / "00000-000.arrow", keep_time=True)
    assert read_of(folder, memory) == 0
    with pytest.raises(UserError, match=r"validation/00000-000\.arrow is damaged: its content"):
        Store.open(folder).verify()


def test_a_memory_is_of_one_manifest(folder: Path, memory: Path):
    read_of(folder, memory)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 90_000}))
    with pytest.raises(UserError, match=r"manifest\.json was altered"):
        read_of(folder, memory)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100_000, "x": 1}))
    assert read_of(folder, memory) == 3


def test_what_is_no_memory_is_none(folder: Path, memory: Path):
    for content in ("", "[]", '{"verified": 1}', '{"verified": [1, "x"]}'):
        memory.write_text(content)
        assert read_of(folder, memory) == 3
    assert read_of(folder, memory) == 0
    assert read_of(folder, memory / "cannot be written") == 3


def test_the_parts_of_a_mixture(folder: Path, memory: Path, tmp_path: Path):
    more = write_store(tmp_path / "more", 7, SIZE // 16, validation=SIZE // 16, shard=SIZE // 16)
    read_of(folder, memory)
    assert read_of({str(folder): 1, more: 1}, memory) == 2
    assert read_of({str(folder): 1, more: 1}, memory) == 0


def test_a_memory_does_not_grow(folder: Path, memory: Path):
    for time in range(1, 4):
        os.utime(folder / "train" / "00001-000.arrow", ns=(time, time))
        read_of(folder, memory)
    assert len(json.loads(memory.read_text())["verified"]) == 3
