"""Small stores with identifiable blocks."""

from pathlib import Path
from typing import Any

import numpy as np

from pmp_ds.data.arrow_store import write_shard
from pmp_ds.data.manifest import write_manifest

T = 4


def write_store(
    folder: Path, first: int, train: int, validation: int = 8, shard: int = 100, **manifest: Any
) -> str:
    """Write a store of ``train`` and ``validation`` blocks of T tokens, each token the block's own
    number, counted from ``first``; ``shard`` blocks per shard. Return the folder."""
    splits = {}
    for split, count in (("train", train), ("validation", validation)):
        (folder / split).mkdir(parents=True)
        rows = np.repeat(np.arange(first, first + count, dtype=np.uint32)[:, None], T, axis=1)
        shards = [
            write_shard(folder, split, f"{i:05d}-000.arrow", rows[start : start + shard])
            for i, start in enumerate(range(0, count, shard))
        ]
        splits[split] = {"blocks": count, "documents": 1, "dropped_tokens": 0, "shards": shards}
        first += count
    settings = {"input": [{"input": folder.name}]}
    write_manifest(
        folder,
        {
            "block_size": T,
            "dtype": "uint32",
            "vocab_size": 100_000,
            "eos_id": 2,
            "tokenizer": {"fingerprint": "f" * 64},
            "unigram_cross_entropy": 6.0,
            "splits": splits,
            "settings": settings,
        }
        | manifest,
    )
    return str(folder)
