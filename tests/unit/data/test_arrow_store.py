"""The format on disk: exact round trip, zero-copy for `datasets` too, and all damage is
detected."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmp_ds.data import blocks as blocks_module
from pmp_ds.data import readahead
from pmp_ds.data.arrow_store import Store, write_shard
from pmp_ds.data.blocks import Blocks
from pmp_ds.data.manifest import SPLITS, write_manifest
from pmp_ds.errors import UserError
from tests.helpers.examples import examples
from tests.helpers.stores import write_store

ROWS = {"train": (5, 3, 4), "validation": (2,)}
T = 8


def make_store(folder: Path, dtype: str = "uint16", vocab_size: int = 1000) -> dict[str, list]:
    """Make a store with several shards; return its blocks by split."""
    rng = np.random.default_rng(0)
    blocks = {
        split: [rng.integers(0, 1000, (n, T)).astype(dtype) for n in ROWS[split]]
        for split in SPLITS
    }
    splits = {}
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        shards = [
            write_shard(folder, split, f"{i:05d}-000.arrow", part)
            for i, part in enumerate(blocks[split])
        ]
        splits[split] = {"blocks": sum(ROWS[split]), "shards": shards}
    write_manifest(
        folder,
        {
            "block_size": T,
            "dtype": dtype,
            "vocab_size": vocab_size,
            "eos_id": 2,
            "tokenizer": {"fingerprint": "f" * 64, "kind": "trained"},
            "unigram_cross_entropy": 6.5,
            "splits": splits,
        },
    )
    return blocks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_store(tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_round_trip(tmp_path: Path, dtype: str):
    blocks = make_store(tmp_path / "s", dtype)
    store = Store.open(tmp_path / "s", verify=True)
    for split in SPLITS:
        everything = np.concatenate(blocks[split])
        assert len(store.split(split)) == len(everything)
        found = store.split(split).gather(np.arange(len(everything)))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, everything)
    assert (store.block_size, store.vocab_size, store.eos_id) == (T, 1000, 2)
    assert store.tokenizer_fingerprint == "f" * 64
    assert store.unigram_cross_entropy == 6.5
    assert store.tokenizer_dir == tmp_path / "s" / "tokenizer"


@examples(50)
@given(st.lists(st.integers(0, 11), max_size=30))
def test_gather_equals_reference(indices: list[int]):
    views = [np.arange(n * T, dtype=np.uint16).reshape(n, T) + 100 * n for n in (5, 3, 4)]
    blocks = Blocks(views)
    index = np.array(indices, np.int64)
    if indices:
        np.testing.assert_array_equal(blocks.gather(index), blocks.gather_ref(index))
    else:
        assert blocks.gather(index).shape == (0, T)


@pytest.mark.parametrize("bad", [-1, 12])
def test_gather_refuses_what_is_not_there(folder: Path, bad: int):
    with pytest.raises(IndexError, match=r"outside \[0, 12\)"):
        Store.open(folder).split("train").gather(np.array([0, bad]))


def test_reads_are_views_of_the_files(folder: Path):
    store = Store.open(folder)
    view = store.split("train").views[0]
    address = view.__array_interface__["data"][0]
    ranges = [
        [int(part, 16) for part in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(".arrow")
    ]
    assert any(low <= address < high for low, high in ranges)
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1


def test_datasets_maps_it_as_it_is(folder: Path):
    loaded = datasets.load_from_disk(str(folder))
    store = Store.open(folder)
    for split in SPLITS:
        blocks = store.split(split)
        expected = blocks.gather(np.arange(len(blocks)))
        table = loaded[split].data
        assert str(table.schema.field("input_ids").type) == f"fixed_size_list<item: uint16>[{T}]"
        np.testing.assert_array_equal(loaded[split].with_format("numpy")["input_ids"], expected)
        address = table.column(0).chunk(0).values.buffers()[1].address
        maps = Path("/proc/self/maps").read_text().splitlines()
        mapped = [line.split()[0].split("-") for line in maps if line.endswith(".arrow")]
        assert any(int(low, 16) <= address < int(high, 16) for low, high in mapped)


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.arrow"))


def test_missing_shard(folder: Path):
    shard_paths(folder)[1].unlink()
    with pytest.raises(UserError, match=r"00001-000\.arrow is damaged: it is missing; run"):
        Store.open(folder)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_shard(folder: Path, keep: int):
    path = shard_paths(folder)[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"00000-000\.arrow is damaged: it has \d+ bytes"):
        Store.open(folder)


def test_any_flipped_bit_is_found(folder: Path):
    """A bit in the tokens, the Arrow headers or the padding: never another exception, never
    silence."""
    for path in (shard_paths(folder)[0], shard_paths(folder)[-1]):
        intact = path.read_bytes()
        for position in range(0, len(intact), 7):
            flipped = bytearray(intact)
            flipped[position] ^= 1 << (position % 8)
            path.write_bytes(flipped)
            with pytest.raises(UserError, match=rf"{path.name} is damaged.*prepare-data"):
                Store.open(folder, verify=True)
        path.write_bytes(intact)
    Store.open(folder, verify=True)


def test_swapped_shards_are_found(folder: Path):
    """Two shards of equal size are swapped: only the hash differs."""
    source = folder / "train"
    payload = write_shard(folder, "train", "twin.arrow", np.zeros((5, T), np.uint16))
    assert payload["bytes"] == (source / "00000-000.arrow").stat().st_size
    shutil.move(source / "twin.arrow", source / "00000-000.arrow")
    Store.open(folder)
    with pytest.raises(UserError, match=r"00000-000\.arrow.*sha256"):
        Store.open(folder, verify=True)


def test_token_outside_the_vocabulary(tmp_path: Path):
    make_store(tmp_path / "s", vocab_size=500)
    with pytest.raises(UserError, match=r"token \d+ is outside vocab_size=500"):
        Store.open(tmp_path / "s").verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format 2, which a later version of pmp-ds reads; "),
        ({"format": "other"}, "is not the manifest of a packed store"),
        ({"splits": {}}, "manifest.json is damaged"),
        ({"block_size": 4}, r"contains \(5, 8\) uint16, but the manifest says \(5, 4\)"),
        ({"dtype": "uint32"}, "the manifest says"),
        ({"eos_id": 3}, "manifest.json was altered"),
        ({"bos_id": 1}, "manifest.json was altered"),
    ],
)
def test_changed_manifest(folder: Path, change: dict, message: str):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Store.open(folder, verify=True)


def test_unreadable_manifest(folder: Path, tmp_path: Path):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="json is damaged: it is not JSON"):
        Store.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest\.json.*prepare-data"):
        Store.open(folder)
    with pytest.raises(UserError, match="none does not exist"):
        Store.open(tmp_path / "none")


@pytest.mark.processes
def test_more_shards_than_open_files(tmp_path: Path):
    """Mapped shards keep no descriptor; in a process of its own, whose limit is lower."""
    folder = write_store(tmp_path / "many", 0, 300, shard=1)
    script = (
        "import resource, sys, numpy as np\n"
        "from pmp_ds.data.arrow_store import Store\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "store = Store.open(sys.argv[1], verify=True)\n"
        "blocks = store.split('train')\n"
        "assert len(blocks.views) == 300\n"
        "assert blocks.gather(np.arange(300))[:, 0].tolist() == list(range(300))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_cold_blocks_are_asked_for_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After a slow gather, the next one prefetches its blocks."""
    folder = tmp_path / "cold"
    write_store(folder, 0, 300_000, shard=200_000, vocab_size=1 << 20)
    blocks = Store.open(folder).split("train")
    asked = []

    def will_need(view, rows):
        asked.append((view, rows))
        readahead.will_need(view, rows)

    monkeypatch.setattr(blocks_module, "will_need", will_need)
    indices = np.array([299_999, 7, 210_000])
    for seconds, calls in ((0.0, 0), (1e9, 2), (0.0, 2)):  # slow, slow before it, fast before it
        monkeypatch.setattr(blocks_module, "COLD_SECONDS", seconds)
        assert blocks.gather(indices)[:, 0].tolist() == indices.tolist()
        assert len(asked) == calls
    for view, rows in asked:
        assert rows.tolist() in ([7], [99_999, 10_000])
        assert view is blocks.views[len(rows) - 1]


def test_a_file_beside_the_shards_is_not_read(folder: Path):
    shutil.copy(shard_paths(folder)[0], folder / "train" / "zzz.arrow")
    assert len(Store.open(folder).split("train")) == 12


def test_dataset_id_follows_the_content(tmp_path: Path):
    make_store(tmp_path / "a")
    make_store(tmp_path / "b")
    make_store(tmp_path / "c", vocab_size=1001)
    ids = [Store.open(tmp_path / name).dataset_id for name in "abc"]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.processes
def test_reading_needs_no_torch():
    modules = "pmp_ds.prepare.corpus, pmp_ds.prepare.packing, pmp_ds.data.arrow_store"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
