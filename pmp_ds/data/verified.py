"""Check a store at the start of a job, on all ranks together and without repeating earlier checks.

    check_together(store, run.verified)

Every rank hashes a share of the shards. An intact shard is remembered by the hash of its manifest,
its name, size, modification time and inode, and is not read again while they stay the same.
``Store.verify`` always reads every byte.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pmp_ds import dist
from pmp_ds.data.arrow_store import Store
from pmp_ds.data.mixed_store import Dataset
from pmp_ds.foreign import ForeignError, read_object
from pmp_ds.progress import Progress
from pmp_ds.run_dir import write_json

_SHOW_PROGRESS = 1 << 30  # minimum bytes: a second of hashing


def check_together(data: Dataset, memory: Path) -> int:
    """Raise UserError on every rank when a shard or tokenizer of ``data`` is damaged on any.

    Returns the bytes of shards read by this rank. Ranks that see the same files share them; ranks
    with their own copy check that copy. Intact shards are remembered in ``memory`` if it can be
    written. Collective.
    """
    marks = dist.together(lambda: _marks(data.stores))
    copies: list[str] = dist.all_gather_object(hashlib.sha256("".join(marks).encode()).hexdigest())
    same = [rank for rank, copy in enumerate(copies) if copy == copies[dist.rank()]]
    known = set(dist.on_rank0(lambda: _read(memory)))
    shards = [(store, number) for store in data.stores for number in range(len(store.shards))]
    new = [shard for shard, mark in zip(shards, marks, strict=True) if mark not in known]
    mine = new[same.index(dist.rank()) :: len(same)]
    # Without a time limit: with one slow disk, the others would exceed a collective's.
    dist.together(lambda: _check(mine), patient=True)
    of_copies = dist.all_gather_object(marks if same[0] == dist.rank() else [])
    found = {mark for marks in of_copies for mark in marks}
    if dist.rank() == 0 and found != known:
        with contextlib.suppress(OSError):
            write_json(memory, {"verified": sorted(found)})
    return sum(store.shards[number]["bytes"] for store, number in mine)


def not_remembered(data: Dataset, memory: Path) -> list[tuple[Store, int]]:
    """Return the shards that are not remembered as intact. Raises UserError for a missing one."""
    known = set(_read(memory))
    shards = [(store, number) for store in data.stores for number in range(len(store.shards))]
    marks = _marks(data.stores)
    return [shard for shard, mark in zip(shards, marks, strict=True) if mark not in known]


def _marks(stores: Sequence[Store]) -> list[str]:
    """Return a mark per shard that changes with it. Raises UserError for a missing shard."""
    marks = []
    for store in stores:
        store.check_facts()
        manifest = hashlib.sha256(json.dumps(store.manifest, sort_keys=True).encode()).hexdigest()
        for number, shard in enumerate(store.shards):
            facts = store.look(number)
            mark = [manifest, shard["file"], facts.st_size, facts.st_mtime_ns, facts.st_ino]
            marks.append(hashlib.sha256(json.dumps(mark).encode()).hexdigest()[:32])
    return marks


def _read(memory: Path) -> list[str]:
    """Return the marks of intact shards; none if they cannot be read."""
    try:
        found = read_object(memory).get("verified")
    except ForeignError:
        return []
    return [mark for mark in found if isinstance(mark, str)] if isinstance(found, list) else []


def _check(shards: Sequence[tuple[Store, int]]) -> None:
    total = sum(store.shards[number]["bytes"] for store, number in shards)
    with Progress("verify data", "B", total, scale=True, disable=total < _SHOW_PROGRESS) as bar:
        for store, number in shards:
            store.check_shard(number)
            bar.update(store.shards[number]["bytes"])
