"""Merge packed stores: a manifest over hard links, without rewriting a shard."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pmp_ds.data.arrow_store import Store
from pmp_ds.data.manifest import MUST_AGREE, SPLITS, write_manifest
from pmp_ds.errors import UserError, quoted
from pmp_ds.prepare.units import unigram_cross_entropy
from pmp_ds.run_dir import fsync_dir


def merge_stores(out: str | Path, folders: Sequence[str | Path]) -> Store:
    """Make ``out`` from the blocks of all ``folders``, in this order, after checking every byte.

    The shards are hard links, or copies where the file system has none. Raises UserError when
    ``out`` exists, a store is damaged or named twice, or tokenizer or block size differ.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"out={out} exists; choose another folder")
    if len(folders) < 2 or len({Path(f).resolve() for f in folders}) < len(folders):
        raise UserError("merge takes two or more different folders, each once")
    stores = [Store.open(folder, verify=True) for folder in folders]
    _check_alike(stores)
    staging = out.with_name(out.name + ".incomplete")
    if staging.exists():
        raise UserError(f"{staging} is in the way; move or delete it")
    try:
        for name in SPLITS:
            (staging / name).mkdir(parents=True)
        first = stores[0].manifest
        splits = {split: _merge_split(staging, split, stores) for split in SPLITS}
        _link_folder(stores[0].tokenizer_dir, staging / "tokenizer")
        counts = [_count(stores, split) for split in SPLITS]
        write_manifest(
            staging,
            {
                **{key: first.get(key) for key in MUST_AGREE},
                "rows": _merge_rows(stores),
                "settings": {
                    "merged": [store.dataset_id for store in stores],
                    "input": _inputs(stores),
                },
                "splits": splits,
                "tokenizer": first["tokenizer"],
                "unigram_cross_entropy": unigram_cross_entropy(*counts),
                "warnings": _warnings(stores),
            },
        )
        os.replace(staging, out)
        fsync_dir(out.parent)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Store.open(out)


def _check_alike(stores: Sequence[Store]) -> None:
    first = stores[0]
    for other in stores[1:]:
        if found := first.unlike(other):
            raise UserError(
                f"{first.folder} and {other.folder} cannot be merged: {'; '.join(found)}; prepare "
                f"one of them again (--tokenizer {quoted(first.tokenizer_dir)})"
            )


def _merge_split(staging: Path, split: str, stores: Sequence[Store]) -> dict[str, Any]:
    parts = [store.manifest["splits"][split] for store in stores]
    shards = []
    for number, (store, part) in enumerate(zip(stores, parts, strict=True)):
        for shard in part["shards"]:
            name = f"{split}/{number:03d}-{Path(shard['file']).name}"
            _link(store.folder / shard["file"], staging / name)
            shards.append({**shard, "file": name})
    fsync_dir(staging / split)
    totals = {
        key: sum(part[key] for part in parts) for key in ("blocks", "documents", "dropped_tokens")
    }
    return {**totals, "shards": shards}


def _count(stores: Sequence[Store], split: str) -> Any:
    """Return counts as in ``units.UnitResult.unigrams``, ``(vocab_size,)``."""
    counts = np.zeros(stores[0].vocab_size, np.int64)
    for store in stores:
        for view in store.split(split).views:
            for start in range(0, len(view), 1 << 14):
                blocks = view[start : start + (1 << 14), 0 if split == "train" else 1 :]
                counts += np.bincount(blocks.reshape(-1), minlength=len(counts))
    return counts


def _inputs(stores: Sequence[Store]) -> list[Any]:
    return [given for store in stores for given in store.manifest["settings"].get("input", [])]


def _merge_rows(stores: Sequence[Store]) -> dict[str, Any]:
    rows = [store.manifest["rows"] for store in stores]
    return {
        **{key: sum(row[key] for row in rows) for key in ("read", "malformed", "empty")},
        "rejected": [reason for row in rows for reason in row["rejected"]],
    }


def _warnings(stores: Sequence[Store]) -> list[str]:
    warnings = [text for store in stores for text in store.manifest["warnings"]]
    fractions = {store.manifest["settings"].get("val_fraction") for store in stores}
    if len(fractions) > 1:
        warnings.append(
            "the stores hold out different shares for validation: a document in two of them may be "
            "in the train split of one and the validation split of the other"
        )
    return list(dict.fromkeys(warnings))


def _link_folder(source: Path, target: Path) -> None:
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _link_folder(path, target / path.name)
        else:
            _link(path, target / path.name)
    fsync_dir(target)


def _link(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    with open(source, "rb") as reader, open(target, "wb") as writer:
        shutil.copyfileobj(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())
