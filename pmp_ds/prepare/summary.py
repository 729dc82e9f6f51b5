"""The closing report of a preparation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmp_ds.data.manifest import SPLITS


def separators(manifest: dict[str, Any]) -> str:
    """Return the tokens between documents, in words."""
    bos = manifest.get("bos_id")
    before = "no begin of text" if bos is None else f"begin of text {bos} before"
    return f"{before}, end of text {manifest['eos_id']} after every document"


@dataclass(frozen=True, kw_only=True)
class PrepareSummary:
    """A store's content and the work of making it; ``str()`` is the closing report."""

    folder: Path
    reused: bool
    """Whether the complete store existed before, made with the same settings."""

    manifest: dict[str, Any]

    seconds: float | None = None
    """None: the store existed before, or several machines made it."""

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self.manifest["warnings"])

    @property
    def tokens(self) -> int:
        """Tokens in the blocks of all splits."""
        return sum(self.blocks.values()) * int(self.manifest["block_size"])

    @property
    def blocks(self) -> dict[str, int]:
        """Blocks per split."""
        return {split: int(self.manifest["splits"][split]["blocks"]) for split in SPLITS}

    def __str__(self) -> str:
        manifest, splits, rows = self.manifest, self.manifest["splits"], self.manifest["rows"]
        documents = sum(split["documents"] for split in splits.values())
        lines = [f"{'already complete' if self.reused else 'prepared'}: {self.folder}"]
        lines.append(
            f"  documents      {documents:,} ({rows['malformed']:,} malformed and "
            f"{rows['empty']:,} empty rows left out of {rows['read']:,})"
        )
        lines += [f"                 {reason}" for reason in rows["rejected"]]
        for name, split in splits.items():
            lines.append(
                f"  {name:<14} {split['blocks']:,} blocks of {manifest['block_size']} = "
                f"{split['blocks'] * manifest['block_size']:,} tokens from "
                f"{split['documents']:,} documents (tail of {split['dropped_tokens']:,} dropped)"
            )
        lines.append(
            f"  tokenizer      {manifest['tokenizer']['kind']}, {manifest['vocab_size']:,} ids "
            f"({manifest['dtype']}), encoded by {manifest['tokenizer']['engine']}"
        )
        lines.append(f"  separators     {separators(manifest)}")
        lines.append(
            f"  unigram        {self.manifest['unigram_cross_entropy']:.4f} nats per token "
            "(a model that learned only frequencies)"
        )
        lines.append(f"  dataset id     {manifest['dataset_id'][:16]}")
        if self.seconds is not None:
            lines.append(
                f"  time           {self.seconds:.1f} s, {self.tokens / self.seconds:,.0f} tokens/s"
            )
        return "\n".join([*lines, *(f"  warning: {warning}" for warning in self.warnings)])
