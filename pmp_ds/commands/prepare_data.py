"""Turn text into the packed token blocks that training reads.

Run `pmp-ds prepare-data --help`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pmp_ds.cli import PlainParser, parse
from pmp_ds.data.arrow_store import Store
from pmp_ds.data.manifest import SPLITS
from pmp_ds.errors import UserError, exit_code, quoted
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


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    verbs = {
        "verify": _verify,
        "inspect": _inspect,
        "merge": _merge,
        "plan": _plan,
        "pack": _pack,
        "finish": _finish,
    }
    if argv[:1] and argv[0] in verbs:
        verbs[argv[0]](argv[1:])
        return
    _report(prepare(_parse(argv)))


def _parse(argv: list[str]) -> PrepareConfig:
    config, _ = parse(
        PrepareConfig, argv, prog="pmp-ds prepare-data", description=DESCRIPTION, epilog=EPILOG
    )
    return config


def _report(summary: PrepareSummary) -> None:
    print(summary)
    print(f"  next           train on it with --data.store {quoted(summary.folder)}")


def _plan(arguments: list[str]) -> None:
    config = _parse(arguments)
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


def _pack(arguments: list[str]) -> None:
    parser = PlainParser(
        "pmp-ds prepare-data pack",
        "Pack this node's share of a plan: what is missing of units I, I + N, I + 2 N, ...\n"
        "Without --node and --nodes: of all units.",
    )
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--node", metavar="I", type=int, default=0, help="number of this node")
    parser.add_argument("--nodes", metavar="N", type=int, default=1, help="how many there are")
    parser.add_argument("--workers", type=int, help="processes (default: as planned, or per core)")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers} must be at least 1")
    print(nodes.pack(options.out, options.node, options.nodes, options.workers))


def _finish(arguments: list[str]) -> None:
    parser = PlainParser(
        "pmp-ds prepare-data finish",
        "Check that all units of a plan are packed, and make the folder.",
    )
    parser.add_argument("out", metavar="OUT", type=Path)
    _report(nodes.finish(parser.parse_args(arguments).out))


def _verify(arguments: list[str]) -> None:
    parser = PlainParser("pmp-ds prepare-data verify", "Check every byte of a folder.")
    parser.add_argument("folder", metavar="DIR", type=Path)
    folder = parser.parse_args(arguments).folder
    store = Store.open(folder, verify=True)
    shards = sum(len(store.manifest["splits"][split]["shards"]) for split in SPLITS)
    print(f"ok: {folder}: {shards} shards, {_blocks(store)}, every sha256 and every token in range")


def _inspect(arguments: list[str]) -> None:
    parser = PlainParser("pmp-ds prepare-data inspect", "Show what a folder holds.")
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--samples", type=int, default=3, help="blocks to decode (default: 3)")
    parser.add_argument("--picture", type=Path, help="file (default: DIR/document_lengths.png)")
    options = parser.parse_args(arguments)
    picture = options.picture or options.folder / "document_lengths.png"
    print(inspect_store(Store.open(options.folder), picture, max(0, options.samples)))


def _merge(arguments: list[str]) -> None:
    parser = PlainParser(
        "pmp-ds prepare-data merge",
        "Make one folder of several that have the same tokenizer and block size, in this order.\n"
        "Shards become hard links; every byte is checked.",
    )
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    store = merge_stores(options.out, options.folders)
    print(f"merged: {options.out}: {_blocks(store)} from {len(options.folders)} folders")


def _blocks(store: Store) -> str:
    train, validation = (len(store.split(split)) for split in SPLITS)
    return f"{train:,} train and {validation:,} validation blocks of {store.block_size}"


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds prepare-data` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
