"""Fill a folder with a complete store: tokenize, split, pack, write shards and the manifest."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmp_ds.config import PrepareConfig
from pmp_ds.data.arrow_store import (
    SHARD_BLOCKS,
    SPLITS,
    read_manifest,
    write_manifest,
    write_shard,
)
from pmp_ds.data.corpus import Rejects, Source, Unit, group_units, read_documents
from pmp_ds.data.packing import Packer, Tokens, is_validation, token_dtype
from pmp_ds.data.tokenizer import Tokenizer, count_mismatches
from pmp_ds.errors import UserError
from pmp_ds.progress import Progress
from pmp_ds.run_dir import fsync_dir

_BATCH_CHARS = 1 << 22
_BATCH_DOCUMENTS = 2048
_SAMPLE_DOCUMENTS = 256
_SAMPLE_CHARS = 20_000


@dataclass
class _Tally:
    """What is counted over all units."""

    unigrams: dict[str, npt.NDArray[np.int64]]
    """Occurrences of every id: in all of train, at positions 1.. of validation blocks."""

    rejects: Rejects = field(default_factory=Rejects)
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    shards: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {split: [] for split in SPLITS}
    )
    sample: list[str] = field(default_factory=list)
    """Beginnings of documents from all over the corpus."""


def build_store(
    folder: Path,
    config: PrepareConfig,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Fill ``folder`` with the complete store and return its manifest."""
    tokenizer_files = _save_tokenizer(tokenizer, folder / "tokenizer")
    vocab_size = tokenizer.vocab_size
    tally = _Tally({split: np.zeros(vocab_size, np.int64) for split in SPLITS})
    total = sum(source.num_bytes for source in sources)
    with Progress("tokenize and pack", "B", total, scale=True) as bar:
        for unit in group_units(sources):
            _pack_unit(folder, unit, config, tokenizer, tally, bar)
    tally.rejects.check()
    _check_not_empty(config, tally)
    warnings = _compare_saved(tokenizer, folder / "tokenizer", tally.sample)
    splits = {
        split: {
            "blocks": sum(shard["rows"] for shard in tally.shards[split]),
            "documents": tally.documents[split],
            "dropped_tokens": tally.dropped[split],
            "shards": tally.shards[split],
        }
        for split in SPLITS
    }
    write_manifest(
        folder,
        {
            "block_size": config.block_size,
            "dtype": str(token_dtype(vocab_size)),
            "eos_id": tokenizer.eos_id,
            "rows": {
                "read": tally.rejects.rows,
                "malformed": tally.rejects.malformed,
                "empty": tally.rejects.empty,
                "rejected": tally.rejects.describe(),
            },
            "settings": settings,
            "splits": splits,
            "tokenizer": {
                "files": tokenizer_files,
                "fingerprint": tokenizer.fingerprint,
                "kind": tokenizer.kind,
            },
            "unigram_cross_entropy": unigram_cross_entropy(
                tally.unigrams["train"], tally.unigrams["validation"]
            ),
            "vocab_size": vocab_size,
            "warnings": warnings,
        },
    )
    return read_manifest(folder)


def _pack_unit(
    folder: Path,
    unit: Unit,
    config: PrepareConfig,
    tokenizer: Tokenizer,
    tally: _Tally,
    bar: Progress,
) -> None:
    """Write the shards of one unit; nothing but the tally is shared with other units."""
    dtype = token_dtype(tokenizer.vocab_size)
    packers = {s: Packer(config.block_size, tokenizer.eos_id, dtype) for s in SPLITS}
    writers = {s: _ShardWriter(folder, s, unit.index, tally) for s in SPLITS}
    documents = (
        text
        for source in unit.sources
        for text in read_documents(source, config.text_field, tally.rejects, bar.update)
    )
    for texts in _batches(documents):
        if len(tally.sample) < _SAMPLE_DOCUMENTS:
            tally.sample += [text[:_SAMPLE_CHARS] for text in texts[:: len(texts) // 32 + 1]]
        held_out = np.array([is_validation(text, config.val_fraction) for text in texts])
        ids = tokenizer.encode_batch(texts)
        for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
            tally.documents[split] += int(chosen.sum())
            writers[split].add(packers[split].add(ids[i] for i in np.flatnonzero(chosen)))
        bar.set(documents=sum(tally.documents.values()))
    for split in SPLITS:
        blocks, dropped = packers[split].finish()
        tally.dropped[split] += dropped
        writers[split].add(blocks)
        writers[split].close()


class _ShardWriter:
    """Collects the blocks of one unit and split and writes a shard whenever one is full."""

    def __init__(self, folder: Path, split: str, unit: int, tally: _Tally) -> None:
        self._folder, self._split, self._unit, self._tally = folder, split, unit, tally
        self._pending: list[Tokens] = []
        self._num_pending = self._num_shards = 0

    def add(self, blocks: Tokens) -> None:
        """Append ``(n, block_size)``."""
        predicted = blocks if self._split == "train" else blocks[:, 1:]
        counts = self._tally.unigrams[self._split]
        counts += np.bincount(predicted.reshape(-1), minlength=len(counts))
        self._pending.append(blocks)
        self._num_pending += len(blocks)
        while self._num_pending >= SHARD_BLOCKS:
            self._write(SHARD_BLOCKS)

    def close(self) -> None:
        if self._num_pending:
            self._write(self._num_pending)

    def _write(self, rows: int) -> None:
        everything = np.concatenate(self._pending)
        name = f"{self._unit:05d}-{self._num_shards:03d}.arrow"
        entry = write_shard(self._folder, self._split, name, everything[:rows])
        self._tally.shards[self._split].append(entry)
        self._pending = [everything[rows:]]
        self._num_pending = len(everything) - rows
        self._num_shards += 1


def unigram_cross_entropy(
    train_counts: npt.NDArray[np.int64],  # (vocab_size,)
    validation_counts: npt.NDArray[np.int64],  # (vocab_size,)
) -> float:
    """Nats per validation token under the train frequencies, one added to every count."""
    smoothed = train_counts + 1
    log_probabilities = np.log(smoothed) - math.log(int(smoothed.sum()))
    return float(-(validation_counts @ log_probabilities) / validation_counts.sum())


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in documents:
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _check_not_empty(config: PrepareConfig, tally: _Tally) -> None:
    if not sum(tally.documents.values()):
        raise UserError(no_document(config))
    inputs = ", ".join(config.input)
    for split, way_out in (
        ("train", "add text, or lower val_fraction or block_size"),
        ("validation", "add text, raise val_fraction, or lower block_size"),
    ):
        if not tally.shards[split]:
            raise UserError(
                f"the {split} split of input {inputs} is empty: its {tally.documents[split]} "
                f"documents have {tally.dropped[split]} tokens and one block takes "
                f"block_size={config.block_size} (val_fraction={config.val_fraction}); {way_out}"
            )


def no_document(config: PrepareConfig) -> str:
    """The message for input without a single usable document."""
    return (
        f"input {', '.join(config.input)} holds no document with text in it; name files that do, "
        "or add text"
    )


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file by name."""
    tokenizer.save_pretrained(folder)
    digests = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    fsync_dir(folder)
    return digests


def _compare_saved(tokenizer: Tokenizer, folder: Path, sample: Sequence[str]) -> list[str]:
    """Warnings about the saved tokenizer; a trained one has to be exact."""
    compared, other_ids, other_text = count_mismatches(tokenizer, folder, sample)
    if tokenizer.kind == "trained" and other_ids:
        raise UserError(
            f"AutoTokenizer gives other ids on {other_ids} of {compared} documents than the "
            "tokenizer trained here: this is a bug, please report it"
        )
    warnings = []
    if other_ids:
        warnings.append(
            f"AutoTokenizer on {folder.name}/ gives other ids than this {tokenizer.kind} tokenizer "
            f"on {other_ids} of {compared} sampled documents: a release would use the former"
        )
    if other_text:
        warnings.append(
            f"{other_text} of {compared} sampled documents do not come back exactly from decode"
        )
    return warnings
