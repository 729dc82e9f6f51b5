"""Turn text into the packed token blocks that training reads.

Run `python launcher/prepare_data.py --help`.
"""

import sys
from pathlib import Path

from pmp_ds.cli import parse
from pmp_ds.config import PrepareConfig
from pmp_ds.data.arrow_store import SPLITS, Store
from pmp_ds.data.prepare import prepare
from pmp_ds.errors import UserError, exit_code

DESCRIPTION = """\
Turn text into the packed token blocks that training reads, once: documents are tokenized, joined
by one end-of-text token, cut into blocks and stored in a folder. Running the same command again
returns at once when the folder is complete.

  python launcher/prepare_data.py [options]      make a folder
  python launcher/prepare_data.py verify DIR     check every byte of one"""

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
    python launcher/prepare_data.py verify tokenized_data/books"""


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] == ["verify"]:
        _verify(argv[1:])
        return
    config, _ = parse(
        PrepareConfig, argv, prog="prepare_data.py", description=DESCRIPTION, epilog=EPILOG
    )
    summary = prepare(config)
    print(summary)
    print(f"  next           train on it with --data.store {summary.folder}")


def _verify(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        if arguments[:1] in (["-h"], ["--help"]):
            print(DESCRIPTION)
            return
        raise UserError("verify takes one folder: python launcher/prepare_data.py verify DIR")
    folder = Path(arguments[0])
    store = Store.open(folder, verify=True)
    blocks = {split: len(store.split(split)) for split in SPLITS}
    shards = sum(len(store.manifest["splits"][split]["shards"]) for split in SPLITS)
    print(
        f"ok: {folder}: {shards} shards, {blocks['train']:,} train and "
        f"{blocks['validation']:,} validation blocks of {store.block_size}, every sha256 and "
        "every token in range"
    )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
