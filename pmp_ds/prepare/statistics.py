"""Statistics of a store: counts, document lengths, sample text and a plot."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmp_ds.data.arrow_store import Store
from pmp_ds.data.manifest import SPLITS
from pmp_ds.prepare.summary import separators

_CHUNK_BLOCKS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """Statistics of one split, from one pass over it."""

    name: str
    blocks: int
    tokens: int
    documents: int
    """Documents as the manifest counts them, including those in dropped tails."""

    distinct_tokens: int
    lengths: npt.NDArray[np.int64]
    """``(documents that end in the blocks,)``: tokens of each, with begin and end of text."""

    def __str__(self) -> str:
        lengths = self.lengths if len(self.lengths) else np.zeros(1, np.int64)
        low, middle, high = np.percentile(lengths, [5, 50, 95])
        return (
            f"  {self.name:<14} {self.blocks:,} blocks, {self.tokens:,} tokens, "
            f"{self.documents:,} documents, {self.distinct_tokens:,} different tokens\n"
            f"                 tokens per document: mean {lengths.mean():,.1f}, 5% {low:,.0f}, "
            f"median {middle:,.0f}, 95% {high:,.0f}, longest {lengths.max():,}"
        )


def split_statistics(store: Store, split: str) -> SplitStatistics:
    """Read every block of the split; needs 8 bytes per document and per vocabulary id."""
    seen = np.zeros(store.vocab_size, bool)
    lengths: list[npt.NDArray[np.int64]] = []
    blocks = store.split(split)
    open_tokens, unit = 0, ""
    for shard, view in zip(store.manifest["splits"][split]["shards"], blocks.views, strict=True):
        this_unit = Path(shard["file"]).name.rpartition("-")[0]
        if this_unit != unit:  # a unit's tail is dropped, so its last document has no end
            open_tokens, unit = 0, this_unit
        for start in range(0, len(view), _CHUNK_BLOCKS):
            flat = view[start : start + _CHUNK_BLOCKS].reshape(-1)
            seen[flat] = True
            ends = np.flatnonzero(flat == store.eos_id)
            if len(ends):
                lengths.append(np.diff(ends, prepend=-1 - open_tokens))
                open_tokens = 0
            open_tokens += len(flat) - (int(ends[-1]) + 1 if len(ends) else 0)
    return SplitStatistics(
        name=split,
        blocks=len(blocks),
        tokens=len(blocks) * store.block_size,
        documents=int(store.manifest["splits"][split]["documents"]),
        distinct_tokens=int(seen.sum()),
        lengths=np.concatenate([*lengths, np.empty(0, np.int64)]),
    )


def inspect_store(store: Store, picture: Path, samples: int = 3) -> str:
    """Return a report of the store with ``samples`` decoded blocks spread over the train split, and
    plot the document lengths to ``picture``.
    """
    manifest = store.manifest
    found = [split_statistics(store, split) for split in SPLITS]
    kind, engine = (manifest["tokenizer"].get(key) for key in ("kind", "engine"))
    lines = [
        f"{store.folder}: blocks of {store.block_size} {manifest['dtype']}",
        f"  dataset id     {store.dataset_id}",
        f"  tokenizer      {kind}, {store.vocab_size:,} ids, {engine}",
        f"  separators     {separators(manifest)}",
        *map(str, found),
        f"  unigram        {store.unigram_cross_entropy:.4f} nats per token",
        *(f"  warning: {warning}" for warning in manifest["warnings"]),
    ]
    blocks = store.split("train")
    chosen = np.linspace(0, len(blocks) - 1, min(samples, len(blocks))).astype(np.int64)
    if len(chosen):
        tokenizer = _tokenizer(store)
        for index, block in zip(chosen, blocks.gather(chosen), strict=True):
            lines += [f"--- train block {index}:", tokenizer.decode(block.tolist())]
    _draw(found, picture)
    return "\n".join([*lines, f"picture: {picture}"])


def _tokenizer(store: Store) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(store.tokenizer_dir), local_files_only=True, trust_remote_code=False
    )


def _draw(found: list[SplitStatistics], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    longest = max((int(split.lengths.max()) for split in found if len(split.lengths)), default=1)
    edges = np.geomspace(1, max(2, longest) + 1, 60).tolist()
    for split in found:
        axes.hist(split.lengths, bins=edges, histtype="step", linewidth=1.5, label=split.name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of a document",
        ylabel="documents",
        title="Document lengths",
    )
    axes.legend()
    figure.savefig(picture, dpi=150)
    plt.close(figure)
