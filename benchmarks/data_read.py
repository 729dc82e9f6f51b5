"""Shuffled batches of 32 x 256 tokens as int64 tensors, per second of CPU: ours against others.

    python -m benchmarks.data_read --megatron /path/to/python

Contenders read the same random tokens, made here, in the same kind of random order: a numpy memmap
gather, which is the floor, our store through BlockLoader, the same store through `datasets`, and
megatron-core's GPTDataset, run by the interpreter that --megatron names (it needs numpy, torch and
megatron-core; without it the line says `did not run`). All take turns. `cold` opens the files anew
after dropping them from the page cache and counts wall time. Prints a table, then a line per
figure; the exit code says only whether it ran.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import hardware, print_figure
from pmp_ds.data.arrow_store import SHARD_BLOCKS, Store, write_shard
from pmp_ds.data.blocks import Blocks
from pmp_ds.data.loader import BlockLoader, order_key
from pmp_ds.data.manifest import write_manifest

BATCH, BLOCK, VOCAB = 32, 256, 32_000


def main(options: argparse.Namespace) -> None:
    print(f"hardware: {hardware(torch.device('cpu'))}")
    if options.megatron and not _has_megatron(options.megatron):
        print(f"--megatron {options.megatron} cannot import megatron-core: left out")
        options.megatron = None
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        flat = _make(folder, options.blocks)
        rates = _warm(folder, flat, options)
        print(f"{options.blocks:,} blocks of {BLOCK}, batches of {BATCH}, warm")
        print(f"{'':24}{'blocks per CPU second':>24}")
        for name in ("memmap", "ours", "datasets", "megatron"):
            print(f"{name:24}{f'{rates[name]:,.0f}' if name in rates else 'did not run':>24}")
        cold = _cold(folder, flat, options)
        for name, rate in cold.items():
            print(f"{name + ', cold':24}{rate:24,.0f} (per second of wall time)")
    for name, goal in (("memmap", 0.35), ("datasets", 10), ("megatron", 40)):
        if name in rates:
            print_figure(f"read_speed_vs_{name}", rates["ours"] / rates[name], goal, at_least=True)
    print_figure("cold_read_speed_vs_memmap", cold["ours"] / cold["memmap"], 1.0, at_least=True)


def _warm(folder: Path, flat: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the median blocks per CPU second of every contender, after a first round."""
    steps, fewer = options.steps, max(1, options.steps // 10)
    blocks = Store.open(folder).split("train")
    runs: dict[str, Callable[[], float]] = {
        "memmap": partial(_rate, partial(_memmap, _map(flat)), steps),
        "ours": partial(_rate, partial(_ours, blocks), steps),
        "datasets": partial(_rate, partial(_datasets, folder), fewer),
    }
    with contextlib.ExitStack() as stack:
        if options.megatron:
            runs["megatron"] = stack.enter_context(_megatron(options, flat, folder, fewer))
        rounds = [{name: run() for name, run in runs.items()} for _ in range(options.repeats + 1)]
    return {name: statistics.median(r[name] for r in rounds[1:]) for name in runs}


def _cold(folder: Path, flat: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the median blocks per second of wall time, with files opened anew and nothing
    mapped."""
    steps = max(1, options.steps // 20)
    runs: dict[str, Callable[[], None]] = {
        "memmap": lambda: _memmap(_map(flat), steps),
        "ours": lambda: _ours(Store.open(folder).split("train"), steps),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            _drop([flat, *sorted(folder.glob("train/*.arrow"))])
            start = time.perf_counter()
            run()
            rates[name].append(steps * BATCH / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def _make(folder: Path, num_blocks: int) -> Path:
    """Make a store at ``folder`` and its train blocks as one flat file; return the file's path."""
    random = np.random.default_rng(0)
    shards = {"train": num_blocks, "validation": 1}
    entries = {}
    for split, rows in shards.items():
        (folder / split).mkdir()
        entries[split] = [
            write_shard(
                folder,
                split,
                f"{i:05d}-000.arrow",
                random.integers(0, VOCAB, (min(SHARD_BLOCKS, rows - start), BLOCK), np.uint16),
            )
            for i, start in enumerate(range(0, rows, SHARD_BLOCKS))
        ]
    write_manifest(
        folder,
        {
            "block_size": BLOCK,
            "dtype": "uint16",
            "vocab_size": VOCAB,
            "eos_id": 0,
            "tokenizer": {"fingerprint": ""},
            "unigram_cross_entropy": 0.0,
            "splits": {split: {"shards": entries[split]} for split in shards},
        },
    )
    flat = folder / "flat.bin"
    with open(flat, "wb") as file:
        for view in Store.open(folder).split("train").views:
            file.write(view.data)
    return flat


def _rate(run: Callable[[int], None], steps: int) -> float:
    """Return blocks per second of CPU time of this process, all threads."""
    start = time.process_time()
    run(steps)
    return steps * BATCH / max(1e-9, time.process_time() - start)


def _map(path: Path) -> npt.NDArray[np.uint16]:
    return np.memmap(path, np.uint16, "r").reshape(-1, BLOCK)


def _memmap(blocks: npt.NDArray[np.uint16], steps: int) -> None:
    order = np.random.default_rng(1).permutation(len(blocks))
    for step in range(steps):
        chosen = order[np.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        torch.from_numpy(blocks[chosen].astype(np.int64))


def _ours(blocks: Blocks, steps: int) -> None:
    with BlockLoader(blocks, order_key("benchmark", 1), BATCH, 0, 1) as loader:
        for _ in range(steps):
            loader.next()


def _datasets(folder: Path, steps: int) -> None:
    import datasets

    rows = datasets.load_from_disk(str(folder))["train"].with_format("torch")
    order = np.random.default_rng(1).permutation(len(rows))
    for step in range(steps):
        rows[order[np.arange(step * BATCH, (step + 1) * BATCH) % len(order)].tolist()]["input_ids"]


def _has_megatron(python: str) -> bool:
    command = [python, "-c", "import megatron.core.datasets.gpt_dataset"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def _megatron(
    options: argparse.Namespace, flat: Path, folder: Path, steps: int
) -> Iterator[Callable[[], float]]:
    """Start the other environment's process; each call reads one round and returns its block
    rate."""
    (folder / "megatron").mkdir()
    arguments = [str(flat), str(folder / "megatron"), str(steps)]
    with subprocess.Popen(
        [options.megatron, "-m", "benchmarks.megatron_read", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as peer:
        requests, answers = peer.stdin, peer.stdout
        assert requests is not None
        assert answers is not None

        def read() -> float:
            print(file=requests, flush=True)
            return float(answers.readline().removeprefix("rate "))

        yield read


def _drop(paths: list[Path]) -> None:
    """Drop the files' pages from the page cache; they must not be mapped."""
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
    parser.add_argument("--megatron", metavar="PYTHON", help="interpreter with megatron-core")
    main(parser.parse_args())
