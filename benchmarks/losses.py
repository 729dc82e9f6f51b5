"""Validation losses with fewer bits per moment, against fp32 moments: same key, ticket and batches.

    pmp-ds prepare-data --input TEXT.jsonl --train-vocab-size 8192 --block-size 64 --out STORE
    python -m benchmarks.losses --store STORE

A model of shapes.py is trained from every key once per format, each time on the same random
ticket of density 0.7; validation reads the same blocks. One rank and one thread per run, as many
runs at once as there are cores. Runs that are there already are not repeated: the benchmark can be
stopped. The keys are public, so nothing here is secret.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import hardware, print_figure
from benchmarks.shapes import SHAPES
from pmp_ds.log import read_metrics
from pmp_ds.model.keys import KEY_FILE
from pmp_ds.run_dir import RunDir, write_bytes

MOMENTS = ("fp32", "bf16", "int8")
GOAL = 0.01  # nats
_MODEL = ("hidden_size", "num_layers", "num_heads", "intermediate_size")


@dataclass(frozen=True)
class Arm:
    """One run."""

    key: int
    moments: str

    def run(self, folder: Path) -> RunDir:
        return RunDir(folder / f"{self.moments}-{self.key}")


def main(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    arms = [Arm(key, moments) for key in range(1, options.keys + 1) for moments in MOMENTS]
    print(f"hardware: {hardware(torch.device('cpu'))}")
    print(f"{len(arms)} runs of {options.updates} updates, {options.precision}", flush=True)
    begun = time.monotonic()
    with ThreadPoolExecutor(options.at_once) as pool:
        losses: dict[Arm, float] = {}
        found = pool.map(lambda arm: _loss(arm, folder, options), arms)
        for arm, loss in zip(arms, found, strict=True):
            losses[arm] = loss
            minutes = (time.monotonic() - begun) / 60
            print(f"key {arm.key}, {arm.moments}: {loss:.4f} nats ({minutes:.1f} min)", flush=True)
    print(f"{'validation loss, nats':24}" + "".join(f"{moments:>10}" for moments in MOMENTS))
    for key in range(1, options.keys + 1):
        values = (losses[Arm(key, moments)] for moments in MOMENTS)
        print(f"  key {key:<18}" + "".join(f"{value:10.4f}" for value in values))
    for moments in MOMENTS[1:]:
        above = list(_above(losses, moments))
        print(f"{moments} above fp32: " + ", ".join(f"{one:+.4f}" for one in above))
        print_figure(f"losses_{moments}_above_fp32", max(0.0, statistics.mean(above)), GOAL)
    return 0


def _above(losses: dict[Arm, float], moments: str) -> Iterator[float]:
    for arm, loss in losses.items():
        if arm.moments == moments:
            yield loss - losses[Arm(arm.key, MOMENTS[0])]


def _loss(arm: Arm, folder: Path, options: argparse.Namespace) -> float:
    """Complete the run of ``arm`` and return its last validation loss."""
    run = arm.run(folder)
    if not run.private.exists():
        run.create()
        write_bytes(run.init / KEY_FILE, bytes([arm.key]) * 32, private=True)
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
        "train.micro_batch_size": options.batch,
        "train.precision": options.precision,
        "train.moments": arm.moments,
        "train.lr": 1e-3,
        "train.warmup_steps": options.updates // 10,
        **{f"model.{name}": getattr(model, name) for name in _MODEL},
    }
    command = [sys.executable, "-m", "pmp_ds.commands", "pretrain", "--deepspeed-config", "zero1"]
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
    add("--updates", type=int, default=300)
    add("--batch", type=int, default=16, help="sequences per update")
    add("--val-blocks", type=int, default=256)
    add("--precision", default="bf16", choices=("bf16", "fp32"))
    add("--at-once", type=int, default=os.cpu_count(), help="runs at the same time")
    add("--folder", default="bench/losses", help="where the runs go")
    return parser


if __name__ == "__main__":
    sys.exit(main(arguments().parse_args()))
