"""The settings of pmp-ds prepare-data; docstrings become ``--help``, as in config.py."""

from dataclasses import dataclass
from typing import Literal

from pmp_ds.errors import require


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Text to packed Arrow shards."""

    input: tuple[str, ...] = ("python",)
    """Files, folders, patterns and fsspec URLs of .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet;
    `hf:NAME` streams a Hugging Face dataset; `python` is the interpreter's own documentation and
    standard-library sources."""

    out: str = "tokenized_data/demo"
    """Folder of the packed store; it must not hold another one."""

    text_field: str = "text"
    """Field or column that contains the document."""

    hf_split: str = "train"
    """Split of `hf:` inputs."""

    hf_config: str | None = None
    """Configuration of `hf:` inputs (what `datasets` calls `name`)."""

    hf_revision: str | None = None
    """Branch, tag or commit of `hf:` inputs; name a commit to repeat a store exactly."""

    shuffle_buffer: int = 50_000
    """Rows of `hf:` inputs that are shuffled online (the paper's 50,000); 0 keeps their order."""

    shuffle_seed: int = 0
    """Seed of that shuffle."""

    tokenizer: str | None = None
    """A Hugging Face tokenizer folder or tokenizer.json, or a sentencepiece .model; unset trains
    one on the input."""

    train_vocab_size: int = 4096
    """Size of the tokenizer trained when none is given."""

    engine: Literal["auto", "reference"] = "auto"
    """`auto`: the fast engine where its ids equal the tokenizer's own on a sample of the input.
    `reference`: the tokenizer's own library. The tokens are the same."""

    block_size: int = 256
    """Tokens per block."""

    bos: Literal["none", "document"] = "none"
    """Begin-of-text tokens: `none`, or one before every `document`. An end-of-text token follows
    every document in either case."""

    val_fraction: float = 0.01
    """Share of the documents held out for validation, chosen by a hash of their text."""

    max_malformed: float = 0.01
    """Largest share of rows that may be unusable (not JSON, without the field, not UTF-8); above it
    the run stops."""

    workers: int | None = None
    """Units packed at a time: up to two by threads, more by processes; unset means one per core.
    The store does not depend on it."""

    def __post_init__(self) -> None:
        require(len(self.input) > 0, "input is empty: name a file, a folder or `python`")
        require(self.block_size >= 2, f"block_size={self.block_size} must be at least 2 tokens")
        require(
            0.0 < self.val_fraction < 1.0, f"val_fraction={self.val_fraction} must be in (0, 1)"
        )
        for name in ("shuffle_buffer", "shuffle_seed"):
            value = getattr(self, name)
            require(value >= 0, f"{name}={value} must not be negative")
        require(
            0.0 <= self.max_malformed <= 1.0,
            f"max_malformed={self.max_malformed} must be in [0, 1]",
        )
        require(
            self.workers is None or self.workers >= 1, f"workers={self.workers} must be at least 1"
        )
        require(
            300 <= self.train_vocab_size <= 1 << 20,
            f"train_vocab_size={self.train_vocab_size} must be between 300 (256 bytes and the "
            "special tokens need room) and 1048576",
        )
