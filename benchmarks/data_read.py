"""Shuffled batches of 32 x 256 tokens as int64 tensors, per second of CPU: ours against others.

    python -m benchmarks.data_read

Contenders read the same random tokens, made here, in the same kind of random order: a numpy memmap
gather, which is the floor, our store through BlockLoader, and the same store through `datasets`.
`cold` drops the file from the page cache first and counts wall time. Prints a table, then a line
per figure; the exit code says only whether it ran.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import hardware, print_figure
from pmp_ds.data.arrow_store import SHARD_BLOCKS, Store, write_manifest, write_shard
from pmp_ds.data.loader import BlockLoader, order_key

BATCH, BLOCK, VOCAB = 32, 256, 32_000


def main(options: argparse.Namespace) -> None:
    print(f"hardware: {hardware(torch.device('cpu'))}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = _make(Path(folder), options.blocks)
        flat = Path(folder, "flat.bin")
        blocks = store.split("train")
        flat.write_bytes(b"".join(view.tobytes() for view in blocks.views))
        runs: dict[str, Callable[[int], None]] = {
            "memmap": lambda steps: _memmap(flat, steps),
            "ours": lambda steps: _ours(store, steps),
            "datasets": lambda steps: _datasets(Path(folder), steps),
        }
        steps = {"memmap": options.steps, "ours": options.steps, "datasets": options.steps // 10}
        rates = {name: _rate(runs[name], max(1, steps[name]), options.repeats) for name in runs}
        print(f"{options.blocks:,} blocks of {BLOCK}, batches of {BATCH}, warm")
        print(f"{'':24}{'blocks per CPU second':>24}")
        for name, rate in rates.items():
            print(f"{name:24}{rate:24,.0f}")
        cold = {}
        for name, file in (("memmap", [flat]), ("ours", sorted(Path(folder, "train").glob("*")))):
            _drop(file)
            start = time.perf_counter()
            runs[name](max(1, options.steps // 20))
            rate = max(1, options.steps // 20) * BATCH / (time.perf_counter() - start)
            cold[name] = rate
            print(f"{name + ', cold':24}{rate:24,.0f} (per second of wall time)")
    print_figure("read_speed_vs_memmap", rates["ours"] / rates["memmap"], 0.35, at_least=True)
    print_figure("read_speed_vs_datasets", rates["ours"] / rates["datasets"], 10, at_least=True)
    print_figure("cold_read_speed_vs_memmap", cold["ours"] / cold["memmap"], 1.0, at_least=True)


def _make(folder: Path, num_blocks: int) -> Store:
    random = np.random.default_rng(0)
    shards = {"train": num_blocks, "validation": 1}
    entries = {}
    for split, rows in shards.items():
        (folder / split).mkdir()
        entries[split] = [
            write_shard(folder, split, f"{i:05d}-000.arrow", random.integers(
                0, VOCAB, (min(SHARD_BLOCKS, rows - start), BLOCK), np.uint16))
            for i, start in enumerate(range(0, rows, SHARD_BLOCKS))
        ]  # fmt: skip
    write_manifest(
        folder,
        {
            "block_size": BLOCK, "dtype": "uint16", "vocab_size": VOCAB, "eos_id": 0,
            "tokenizer": {"fingerprint": ""}, "unigram_cross_entropy": 0.0,
            "splits": {split: {"shards": entries[split]} for split in shards},
        },
    )  # fmt: skip
    return Store.open(folder)


def _rate(run: Callable[[int], None], steps: int, repeats: int) -> float:
    """Blocks per second of CPU time of this process, all threads; median, after a first round."""
    rates = []
    for number in range(repeats + 1):
        start = time.process_time()
        run(steps)
        if number:
            rates.append(steps * BATCH / max(1e-9, time.process_time() - start))
    return statistics.median(rates)


def _memmap(path: Path, steps: int) -> None:
    blocks = np.memmap(path, np.uint16, "r").reshape(-1, BLOCK)
    order = np.random.default_rng(1).permutation(len(blocks))
    for step in range(steps):
        chosen = order[np.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        torch.from_numpy(blocks[chosen].astype(np.int64))


def _ours(store: Store, steps: int) -> None:
    with BlockLoader(store.split("train"), order_key("benchmark", 1), BATCH, 0, 1) as loader:
        for _ in range(steps):
            loader.next()


def _datasets(folder: Path, steps: int) -> None:
    import datasets

    rows = datasets.load_from_disk(str(folder))["train"].with_format("torch")
    order = np.random.default_rng(1).permutation(len(rows))
    for step in range(steps):
        rows[order[np.arange(step * BATCH, (step + 1) * BATCH) % len(order)].tolist()]["input_ids"]


def _drop(paths: list[Path]) -> None:
    """Forget the files' pages, if the system lets us."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="reading shuffled batches against other tools")
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the files go (default: the system's temporary one)")
    main(parser.parse_args())
