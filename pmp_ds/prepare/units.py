"""Pack one work unit: its shards and their counts. Runs in any process."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmp_ds.data.arrow_store import SHARD_BLOCKS, write_shard
from pmp_ds.data.manifest import SPLITS
from pmp_ds.foreign import read_object
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import Rejects, Unit
from pmp_ds.prepare.encoder import Encoder
from pmp_ds.prepare.packing import Packer, Tokens, is_validation, token_dtype
from pmp_ds.prepare.readers import read_documents
from pmp_ds.run_dir import atomic_path, sha256, write_json

_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 2048
_COUNTED_TOKENS = 1 << 18  # at a time, because counting converts them to int64


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """Values shared by all units, and further ones for the manifest; sent once to every worker."""

    config: PrepareConfig

    folder: Path
    """The folder of the unfinished store."""

    run: str
    """Values that all units depend on, and the packing engine; parts finished with others are
    useless."""

    settings: dict[str, Any]
    """The settings that determine the content of the store, for the manifest."""

    encoder: Encoder
    vocab_size: int
    eos_id: int
    bos_id: int | None
    """The token at the start of every document, if any."""

    tokenizer: dict[str, Any]
    """The manifest's entry for it."""

    warnings: tuple[str, ...]

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        return token_dtype(self.vocab_size)


@dataclass(kw_only=True)
class UnitResult:
    """The result of packing a unit, besides the shards on disk."""

    unigrams: npt.NDArray[np.int64]
    """``(2, vocab_size)``: occurrences of every id in all of train, and at positions 1.. of the
    validation blocks."""

    rejects: Rejects
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    shards: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {split: [] for split in SPLITS}
    )

    @classmethod
    def nothing(cls, job: PackJob) -> "UnitResult":
        """Return the result of no units."""
        return cls(
            unigrams=np.zeros((len(SPLITS), job.vocab_size), np.int64),
            rejects=Rejects(max_malformed=job.config.max_malformed),
        )

    def add(self, other: "UnitResult") -> None:
        """Append the result of the next unit."""
        self.unigrams += other.unigrams
        self.rejects.merge(other.rejects)
        for split in SPLITS:
            self.documents[split] += other.documents[split]
            self.dropped[split] += other.dropped[split]
            self.shards[split] += other.shards[split]


def pack_unit(
    job: PackJob, unit: Unit, on_bytes: Callable[[int], None] = lambda _: None
) -> UnitResult:
    """Write the shards of one unit, then its ledger entry; depends only on job and unit.

    ``on_bytes`` is called often, with the number of further bytes done. Raises UserError for
    unusable input, and what ``on_bytes`` raises.
    """
    config, result = job.config, UnitResult.nothing(job)
    packers = [Packer(config.block_size, job.eos_id, job.dtype, job.bos_id) for _ in SPLITS]
    writers = [_ShardWriter(job.folder, split, unit.index, result) for split in SPLITS]
    documents = (
        document
        for source in unit.sources
        for document in read_documents(source, config.text_field, result.rejects, on_bytes)
    )
    for batch in _batches(documents):
        held_out = np.array([is_validation(document, config.val_fraction) for document in batch])
        ids = job.encoder.encode_batch(batch)
        spoken = np.array([len(tokens) > 0 for tokens in ids])
        for index in np.flatnonzero(~spoken):  # a tokenizer may drop an entire text
            result.rejects.add_empty(
                f"no token for {batch[index][:40].decode('utf-8', 'ignore')!r}"
            )
        for number, chosen in enumerate((spoken & ~held_out, spoken & held_out)):
            result.documents[SPLITS[number]] += int(chosen.sum())
            writers[number].add(packers[number].add(ids[i] for i in np.flatnonzero(chosen)))
        on_bytes(0)
    for split, packer, writer in zip(SPLITS, packers, writers, strict=True):
        blocks, result.dropped[split] = packer.finish()
        writer.add(blocks)
        writer.close()
    _record(job, unit, result)
    return result


def finished_unit(job: PackJob, unit: Unit) -> UnitResult | None:
    """Return a unit's ledger entry if it is finished and every shard has its sha256."""
    entry_path, counts_path = _paths(job.folder, unit.index)
    try:
        entry = read_object(entry_path)
        expected = (job.run, unit.digest, sha256(counts_path))
        if tuple(entry.pop(key) for key in ("run", "digest", "unigrams")) != expected:
            return None
        for shard in (shard for split in SPLITS for shard in entry["shards"][split]):
            if sha256(job.folder / shard["file"]) != shard["sha256"]:
                return None
        rejects = Rejects(**entry.pop("rejects"))
        rejects.counts = Counter(rejects.counts)
        return UnitResult(unigrams=np.load(counts_path), rejects=rejects, **entry)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def unigram_cross_entropy(
    train_counts: npt.NDArray[np.int64],  # (vocab_size,)
    validation_counts: npt.NDArray[np.int64],  # (vocab_size,)
) -> float:
    """Return nats per validation token under the train frequencies, each count plus one."""
    smoothed = train_counts + 1
    log_probabilities = np.log(smoothed) - math.log(int(smoothed.sum()))
    return float(-(validation_counts @ log_probabilities) / validation_counts.sum())


def _record(job: PackJob, unit: Unit, result: UnitResult) -> None:
    entry_path, counts_path = _paths(job.folder, unit.index)
    with atomic_path(counts_path) as temporary, open(temporary, "wb") as file:
        np.save(file, result.unigrams)
    entry = {
        **vars(result),
        "run": job.run,
        "digest": unit.digest,
        "rejects": vars(result.rejects),
        "unigrams": sha256(counts_path),
    }
    write_json(entry_path, entry)


def _paths(folder: Path, index: int) -> tuple[Path, Path]:
    return folder / "units" / f"{index:05d}.json", folder / "units" / f"{index:05d}.npy"


class _ShardWriter:
    """Collects the blocks of one unit and split, and writes each shard when it is full."""

    def __init__(self, folder: Path, split: str, unit: int, result: UnitResult) -> None:
        self._folder, self._split, self._unit = folder, split, unit
        self._shards, self._counts = result.shards[split], result.unigrams[SPLITS.index(split)]
        self._pending: list[Tokens] = []
        self._num_pending = 0

    def add(self, blocks: Tokens) -> None:
        """Append ``(n, block_size)``."""
        predicted = (blocks if self._split == "train" else blocks[:, 1:]).reshape(-1)
        for start in range(0, len(predicted), _COUNTED_TOKENS):
            some = predicted[start : start + _COUNTED_TOKENS]
            self._counts += np.bincount(some, minlength=len(self._counts))
        self._pending.append(blocks)
        self._num_pending += len(blocks)
        while self._num_pending >= SHARD_BLOCKS:
            self._write(SHARD_BLOCKS)

    def close(self) -> None:
        if self._num_pending:
            self._write(self._num_pending)

    def _write(self, rows: int) -> None:
        everything = np.concatenate(self._pending)
        name = f"{self._unit:05d}-{len(self._shards):03d}.arrow"
        self._shards.append(write_shard(self._folder, self._split, name, everything[:rows]))
        self._pending = [everything[rows:].copy()]
        self._num_pending = len(everything) - rows


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += len(document)
        if num_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch
