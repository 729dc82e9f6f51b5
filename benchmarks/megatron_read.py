"""The peer of data_read in an environment of its own: megatron-core's GPTDataset.

    PYTHON -m benchmarks.megatron_read flat.bin FOLDER STEPS

Writes the tokens of flat.bin (uint16) as documents of 200 to 2,000 tokens into Megatron's indexed
format in FOLDER. For every line of standard input it then reads STEPS shuffled batches of 32 x 256
tokens, without attention masks, and prints its blocks per second of CPU: `rate NUMBER`. Needs
numpy, torch and megatron-core, nothing of pmp_ds.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

BATCH, BLOCK, VOCAB = 32, 256, 32_000


class Tokenizer:
    """Provide the tokenizer interface that GPTDataset requires."""

    vocab_size, eod, pad, bos, eos = VOCAB, VOCAB, VOCAB + 1, VOCAB + 2, VOCAB + 3
    unique_identifiers: dict[str, Any] = {"class": "benchmark"}  # noqa: RUF012


def main(options: argparse.Namespace) -> None:
    dataset = _make(options.flat, options.folder / "peer", options.steps * BATCH)
    for _ in sys.stdin:
        start = time.process_time()
        for first in range(0, options.steps * BATCH, BATCH):
            rows = [dataset[(first + i) % len(dataset)] for i in range(BATCH)]
            torch.utils.data.default_collate(rows)
        print(f"rate {options.steps * BATCH / (time.process_time() - start)}", flush=True)


def _make(flat: Path, prefix: Path, num_samples: int) -> GPTDataset:
    tokens = np.memmap(flat, np.uint16, "r")
    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    start = 0
    while start < len(tokens):
        document = tokens[start : start + int(random.integers(200, 2000))]
        builder.add_document(document, [len(document)])
        start += len(document)
    builder.finalize(f"{prefix}.idx")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=BLOCK,
        blend=([str(prefix)], None),
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=Tokenizer(),
        path_to_cache=str(prefix.parent),
    )
    low = GPTDataset.build_low_level_dataset(str(prefix), config)
    documents = np.arange(GPTDataset.numel_low_level_dataset(low), dtype=np.int32)
    return GPTDataset(low, str(prefix), documents, num_samples, Split.train, config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="megatron-core's GPTDataset, shuffled batches")
    parser.add_argument("flat", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    main(parser.parse_args())
