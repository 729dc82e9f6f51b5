"""Turn text into the packed token blocks that training reads.

Run `python launcher/prepare_data.py --help`.
"""

import sys
from pathlib import Path

from pmp_ds.cli import PlainParser, parse
from pmp_ds.config import PrepareConfig
from pmp_ds.data.arrow_store import SPLITS, Store
from pmp_ds.data.merge import merge_stores
from pmp_ds.data.prepare import prepare
from pmp_ds.data.statistics import inspect_store
from pmp_ds.errors import exit_code

DESCRIPTION = """\
Turn text into the packed token blocks that training reads, once: documents are tokenized, joined
by one end-of-text token, cut into blocks and stored in a folder. Running the same command again
returns at once when the folder is complete.

  python launcher/prepare_data.py [options]          make a folder
  python launcher/prepare_data.py verify DIR         check every byte of one
  python launcher/prepare_data.py inspect DIR        statistics, samples, a picture of lengths
  python launcher/prepare_data.py merge OUT DIR ...  one of several, without rewriting them"""

EPILOG = """\
examples:
  no data at hand: the interpreter's own documentation and sources, in seconds
    python launcher/prepare_data.py
  text files and JSON lines, with a tokenizer of Hugging Face
    python launcher/prepare_data.py --input books/ more.jsonl.gz --tokenizer path/to/tokenizer \\
        --out tokenized_data/books
  another field of the JSON lines, longer blocks, an own vocabulary
    python launcher/prepare_data.py --input posts.jsonl --text_field body --block_size 1024 \\
        --train_vocab_size 16000 --out tokenized_data/posts
  a dataset of the Hugging Face hub, streamed and shuffled as in the paper
    python launcher/prepare_data.py --config launcher/recipes/data-slimpajama-6b.yaml \\
        --tokenizer path/to/llama
  compressed files, Parquet, patterns and URLs
    python launcher/prepare_data.py --input 'dumps/*.jsonl.zst' s3://bucket/corpus/ \\
        --tokenizer path/to/llama --out tokenized_data/dumps
  check a copied folder
    python launcher/prepare_data.py verify tokenized_data/books
  one store of two
    python launcher/prepare_data.py merge tokenized_data/both tokenized_data/books \\
        tokenized_data/dumps"""


def main() -> None:
    argv = sys.argv[1:]
    verbs = {"verify": _verify, "inspect": _inspect, "merge": _merge}
    if argv[:1] and argv[0] in verbs:
        verbs[argv[0]](argv[1:])
        return
    config, _ = parse(
        PrepareConfig, argv, prog="prepare_data.py", description=DESCRIPTION, epilog=EPILOG
    )
    summary = prepare(config)
    print(summary)
    print(f"  next           train on it with --data.store {summary.folder}")


def _verify(arguments: list[str]) -> None:
    parser = PlainParser("prepare_data.py verify", "Check every byte of a folder.")
    parser.add_argument("folder", metavar="DIR", type=Path)
    folder = parser.parse_args(arguments).folder
    store = Store.open(folder, verify=True)
    blocks = {split: len(store.split(split)) for split in SPLITS}
    shards = sum(len(store.manifest["splits"][split]["shards"]) for split in SPLITS)
    print(
        f"ok: {folder}: {shards} shards, {blocks['train']:,} train and "
        f"{blocks['validation']:,} validation blocks of {store.block_size}, every sha256 and "
        "every token in range"
    )


def _inspect(arguments: list[str]) -> None:
    parser = PlainParser("prepare_data.py inspect", "Show what a folder holds.")
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--samples", type=int, default=3, help="blocks to decode (default: 3)")
    parser.add_argument("--picture", type=Path, help="file (default: DIR/document_lengths.png)")
    options = parser.parse_args(arguments)
    picture = options.picture or options.folder / "document_lengths.png"
    print(inspect_store(Store.open(options.folder), picture, max(0, options.samples)))


def _merge(arguments: list[str]) -> None:
    parser = PlainParser(
        "prepare_data.py merge",
        "Make one folder of several that have the same tokenizer and block size, in this order.\n"
        "Shards become hard links; every byte is checked.",
    )
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    store = merge_stores(options.out, options.folders)
    blocks = {split: len(store.split(split)) for split in SPLITS}
    print(
        f"merged: {options.out}: {blocks['train']:,} train and {blocks['validation']:,} validation "
        f"blocks of {store.block_size} from {len(options.folders)} folders"
    )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
