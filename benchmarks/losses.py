"""Validation losses with fewer bits per moment, against fp32 moments: same key, ticket and batches.

    pmp-ds prepare-data --input TEXT.jsonl --train-vocab-size 8192 --block-size 64 --out STORE
    python -m benchmarks.losses --store STORE

A model of shapes.py is trained from every key once per arm, each time on the same random ticket of
density 0.7; validation reads the same blocks. The control has fp32 moments and two ranks: only the
order of sums differs there, so its loss shows what chance does. One thread per rank, as many ranks
at once as there are cores. Finished runs are not repeated, so the benchmark can be stopped. The
keys are public: nothing here is secret.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import hardware, print_figure
from benchmarks.shapes import SHAPES
from pmp_ds.log import read_metrics
from pmp_ds.model.keys import KEY_FILE
from pmp_ds.run_dir import RunDir, write_bytes

ARMS = {"fp32": ("fp32", 1), "bf16": ("bf16", 1), "int8": ("int8", 1), "control": ("fp32", 2)}
"""Moments and ranks. The others are compared with the first."""

GOAL = 0.01  # nats
_MODEL = ("hidden_size", "num_layers", "num_heads", "intermediate_size")


@dataclass(frozen=True)
class Run:
    """One run."""

    arm: str
    key: int

    @property
    def ranks(self) -> int:
        return ARMS[self.arm][1]


def main(options: argparse.Namespace) -> int:
    folder, keys = Path(options.folder), range(1, options.keys + 1)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"hardware: {hardware(torch.device('cpu'))}")
    print(f"{len(ARMS)} x {options.keys} runs of {options.updates} updates, {options.precision}")
    losses: dict[Run, float] = {}
    runs = [Run(arm, key) for arm in ARMS for key in keys]
    for ranks, together in itertools.groupby(runs, lambda run: run.ranks):
        losses |= _complete(together, max(1, options.cores // ranks), folder, options)
    for key in keys:
        values = (f"{arm} {losses[Run(arm, key)]:.4f}" for arm in ARMS)
        print(f"validation loss, nats, key {key}: {', '.join(values)}")
    first, *others = ARMS
    for arm in others:
        above = [losses[Run(arm, key)] - losses[Run(first, key)] for key in keys]
        print(f"{arm} above {first}: " + ", ".join(f"{one:+.4f}" for one in above))
        goal = None if arm == "control" else GOAL
        print_figure(f"losses_{arm}_from_{first}", abs(statistics.mean(above)), goal, digits=4)
    return 0


def _complete(
    runs: Iterable[Run], at_once: int, folder: Path, options: argparse.Namespace
) -> dict[Run, float]:
    """Complete the runs and return their last validation losses."""
    found, todo = {}, list(runs)
    with ThreadPoolExecutor(at_once) as pool:
        losses = pool.map(lambda run: _loss(run, folder, options), todo)
        for run, loss in zip(todo, losses, strict=True):
            found[run] = loss
            print(f"{time.strftime('%H:%M:%S')} {run.arm}, key {run.key}: {loss:.4f}", flush=True)
    return found


def _loss(one: Run, folder: Path, options: argparse.Namespace) -> float:
    run = RunDir(folder / f"{one.arm}-{one.key}")
    if not run.private.exists():
        run.create()
        write_bytes(run.init / KEY_FILE, bytes([one.key]) * 32, private=True)
    model = SHAPES[options.shape].model()
    settings = {
        "run.name": run.root.name,
        "run.root": folder,
        "run.val_every": options.updates,
        "run.val_blocks": options.val_blocks,
        "run.checkpoint_every": options.updates,
        "data.store": options.store,
        "mask.source": "random",
        "train.steps": options.updates,
        "train.global_batch_size": options.batch,
        "train.micro_batch_size": options.batch // one.ranks,
        "train.precision": options.precision,
        "train.moments": ARMS[one.arm][0],
        "train.lr": 1e-3,
        "train.warmup_steps": options.updates // 10,
        **{f"model.{name}": getattr(model, name) for name in _MODEL},
    }
    command = [sys.executable, "-m", "pmp_ds.launch", "--ranks", str(one.ranks), "pretrain"]
    command += ["--deepspeed-config", "zero1"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with open(folder / f"{run.root.name}.log", "ab") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    records = read_metrics(run.metrics)
    return float([r["val_loss"] for r in records if r["phase"] == "train" and "val_loss" in r][-1])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--store", required=True, help="the tokens, with a validation split")
    add("--shape", choices=SHAPES, default="10m", help="the model")
    add("--keys", type=int, default=3, help="how many keys")
    add("--updates", type=int, default=400)
    add("--batch", type=int, default=16, help="sequences per update")
    add("--val-blocks", type=int, default=512)
    add("--precision", default="bf16", choices=("bf16", "fp32"))
    add("--cores", type=int, default=os.cpu_count(), help="ranks at the same time")
    add("--folder", default="bench/losses", help="where the runs go")
    return parser


if __name__ == "__main__":
    sys.exit(main(arguments().parse_args()))
