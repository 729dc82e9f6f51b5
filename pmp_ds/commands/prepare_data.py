"""Turn text into the packed token blocks that training reads.

Run `pmp-ds prepare-data --help`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmp_ds.cli import Verbs, option, parse, run_verb
from pmp_ds.data.arrow_store import Store
from pmp_ds.data.manifest import SPLITS
from pmp_ds.errors import exit_code, quoted, require
from pmp_ds.prepare import nodes
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.merge import merge_stores
from pmp_ds.prepare.prepare import prepare
from pmp_ds.prepare.statistics import inspect_store
from pmp_ds.prepare.summary import PrepareSummary

DESCRIPTION = """\
Turn text into the packed token blocks that training reads, once: documents are tokenized, joined
by one end-of-text token, cut into blocks and stored in a folder. Running the same command again
returns at once when the folder is complete.

  pmp-ds prepare-data [options]          make a folder
  pmp-ds prepare-data verify DIR         check every byte of one
  pmp-ds prepare-data inspect DIR        statistics, samples, a picture of lengths
  pmp-ds prepare-data merge OUT DIR ...  one of several, without rewriting them

  on several machines that share a disk, under any scheduler:
  pmp-ds prepare-data plan [options]     once, first
  pmp-ds prepare-data pack OUT --node I --nodes N      on every machine
  pmp-ds prepare-data finish OUT         once, last"""

EPILOG = """\
examples:
  no data at hand: the interpreter's own documentation and sources, in seconds
    pmp-ds prepare-data
  text files and JSON lines, with a tokenizer of Hugging Face
    pmp-ds prepare-data --input books/ more.jsonl.gz --tokenizer path/to/tokenizer \\
        --out tokenized_data/books
  another field of the JSON lines, longer blocks, an own vocabulary
    pmp-ds prepare-data --input posts.jsonl --text-field body --block-size 1024 \\
        --train-vocab-size 16000 --out tokenized_data/posts
  a dataset of the Hugging Face hub, streamed and shuffled as in the paper
    pmp-ds prepare-data --config data-slimpajama-6b \\
        --tokenizer path/to/llama
  compressed files, Parquet, patterns and URLs
    pmp-ds prepare-data --input 'dumps/*.jsonl.zst' s3://bucket/corpus/ \\
        --tokenizer path/to/llama --out tokenized_data/dumps
  check a copied folder
    pmp-ds prepare-data verify tokenized_data/books
  one store of two
    pmp-ds prepare-data merge tokenized_data/both tokenized_data/books \\
        tokenized_data/dumps"""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Check every byte of a folder."""

    folder: Path = option("DIR", positional=True)
    """A folder that this command made."""


@dataclass(frozen=True, kw_only=True)
class Inspect(Folder):
    """Show what a folder holds."""

    samples: int = 3
    """Blocks to decode."""

    picture: Path | None = option("FILE", None)
    """Where the picture of document lengths goes. Default: DIR/document_lengths.png."""

    def __post_init__(self) -> None:
        require(self.samples >= 0, f"--samples {self.samples} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Make one folder of several that have the same tokenizer and block size, in this order.

    Shards become hard links; every byte is checked."""

    out: Path = option("OUT", positional=True)
    """The new folder."""

    folders: tuple[Path, ...] = option("DIR", positional=True)
    """The folders that it is made of."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Check that all units of a plan are packed, and make the folder."""

    out: Path = option("OUT", positional=True)
    """The folder of the plan."""


@dataclass(frozen=True, kw_only=True)
class Pack(Planned):
    """Pack this node's share of a plan: what is missing of units I, I + N, I + 2 N, ...

    Without --node and --nodes, that is all units."""

    node: int = option("I", 0)
    """Number of this node, from 0."""

    nodes: int = 1
    """How many nodes there are."""

    workers: int | None = None
    """Processes. Default: as planned, or one per core."""

    def __post_init__(self) -> None:
        require(
            self.workers is None or self.workers >= 1,
            f"--workers {self.workers} must be at least 1",
        )


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["plan"]:
        _plan(_parse(argv[1:]))
    elif argv[:1] and argv[0] in VERBS:
        run_verb(VERBS, argv, prog="pmp-ds prepare-data")
    else:
        _report(prepare(_parse(argv)))


def _parse(argv: list[str]) -> PrepareConfig:
    config, _ = parse(
        PrepareConfig, argv, prog="pmp-ds prepare-data", description=DESCRIPTION, epilog=EPILOG
    )
    return config


def _report(summary: PrepareSummary) -> None:
    print(summary)
    print(f"  next           train on it with --data.store {quoted(summary.folder)}")


def _plan(config: PrepareConfig) -> None:
    units = nodes.plan(config)
    if not units:
        print(f"already complete: {config.out}")
        return
    print(
        f"planned: {config.out}: {units} units\n"
        f"  next           pmp-ds prepare-data pack {quoted(config.out)} --node I "
        f"--nodes N for I from 0 to N - 1, with N up to {units},\n"
        f"                 then pmp-ds prepare-data finish {quoted(config.out)}"
    )


def _pack(args: Pack) -> None:
    print(nodes.pack(args.out, args.node, args.nodes, args.workers))


def _finish(args: Planned) -> None:
    _report(nodes.finish(args.out))


def _verify(args: Folder) -> None:
    store = Store.open(args.folder, verify=True)
    shards = sum(len(store.manifest["splits"][split]["shards"]) for split in SPLITS)
    print(
        f"ok: {args.folder}: {shards} shards, {_blocks(store)}, every sha256 and every token in "
        "range"
    )


def _inspect(args: Inspect) -> None:
    picture = args.picture or args.folder / "document_lengths.png"
    print(inspect_store(Store.open(args.folder), picture, args.samples))


def _merge(args: Merge) -> None:
    store = merge_stores(args.out, args.folders)
    print(f"merged: {args.out}: {_blocks(store)} from {len(args.folders)} folders")


VERBS: Verbs = {
    "verify": (Folder, _verify),
    "inspect": (Inspect, _inspect),
    "merge": (Merge, _merge),
    "pack": (Pack, _pack),
    "finish": (Planned, _finish),
}
"""`plan` takes the settings themselves."""


def _blocks(store: Store) -> str:
    train, validation = (len(store.split(split)) for split in SPLITS)
    return f"{train:,} train and {validation:,} validation blocks of {store.block_size}"


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds prepare-data` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
