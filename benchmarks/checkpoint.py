"""Saving a run: how large a checkpoint is, and how long training waits for it.

    python -m benchmarks.checkpoint

One process, ZeRO 1, a Llama-type model of about 26 million parameters in bf16. Ours in the
background and at once, the same without a mask (dense state), and DeepSpeed's own
`save_checkpoint`, which neither hashes nor fsyncs. All take turns. Updates are slower while a save
runs in the background; that is shown as well. Prints a table, then a line per figure; the exit
code says only whether it ran.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import hardware, print_figure
from pmp_ds import dist
from pmp_ds.config import Config, MaskConfig, ModelConfig, RunConfig, TrainConfig
from pmp_ds.discover.discover import random_ticket
from pmp_ds.engine.engine import Engine
from pmp_ds.log.writer import MetricsLog
from pmp_ds.model.build import build_model, model_config
from pmp_ds.model.parameters import num_params, parameter_table
from pmp_ds.run_dir import RunDir
from pmp_ds.state.checkpoint import Position
from pmp_ds.state.saver import Saver
from pmp_ds.ticket.mask import ParamMask

BLOCK = 64
POSITION = Position(step=0, consumed_samples=0, ticket_id=None, dataset_id="", val_loss=None)


def main(options: argparse.Namespace) -> None:
    dist.init()
    device = dist.device()
    print(f"hardware: {hardware(device)}")
    shape = ModelConfig(
        hidden_size=options.hidden_size, num_layers=8, num_heads=8, max_positions=BLOCK
    )
    hf_config = model_config(shape, vocab_size=8192, eos_id=2, bos_id=None, block_size=BLOCK)
    torch.manual_seed(0)
    table = parameter_table(build_model(hf_config))
    mask = random_ticket(bytes(32), MaskConfig(density=options.density), table).mask
    train = TrainConfig(global_batch_size=8, micro_batch_size=8)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        masked, dense = (
            _Run(Path(folder, name), Engine(build_model(hf_config), train, _ZERO1), chosen)
            for name, chosen in (("masked", mask), ("dense", None))
        )
        ways: dict[str, Callable[[], float]] = {
            "ours, in the background": lambda: masked.save(background=True),
            "ours, at once": lambda: masked.save(background=False),
            "ours, dense, at once": lambda: dense.save(background=False),
            "DeepSpeed's, dense": dense.save_with_deepspeed,
        }
        waits: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.repeats + 1):
            for name, save in ways.items():
                seconds = save()
                if number:  # the first round warms up
                    waits[name].append(seconds)
        alone, beside = masked.update_seconds(options.repeats)
        sizes = {
            "ours, in the background": masked.num_bytes,
            "ours, at once": masked.num_bytes,
            "ours, dense, at once": dense.num_bytes,
            "DeepSpeed's, dense": dense.deepspeed_bytes,
        }
    print(f"{num_params(table):,} parameters in bf16, density {options.density}, one rank")
    print(f"{'':26}{'training waits, ms':>20}{'MB':>10}{'B/parameter':>14}")
    waited = {name: statistics.median(times) for name, times in waits.items()}
    for name, seconds in waited.items():
        print(
            f"{name:26}{seconds * 1e3:20.1f}{sizes[name] / 1e6:10.1f}"
            f"{sizes[name] / num_params(table):14.2f}"
        )
    print(f"an update takes {beside / alone:.2f} times as long while one is being written")
    mine, theirs = sizes["ours, at once"], sizes["ours, dense, at once"]
    ours, at_once = waited["ours, in the background"], waited["ours, at once"]
    print_figure("checkpoint_bytes_vs_dense", mine / theirs, 0.76)
    print_figure("background_stall_vs_at_once", ours / at_once, 0.25)
    print_figure("background_stall_vs_deepspeed", ours / waited["DeepSpeed's, dense"], 1.0)
    dist.shutdown()


_ZERO1 = {"zero_optimization": {"stage": 1}}


class _Run:
    """Hold an engine with a folder to save to."""

    def __init__(self, root: Path, engine: Engine, mask: ParamMask | None) -> None:
        self._run, self._engine = RunDir(root), engine
        self._run.create()
        engine.arm(mask)
        log = MetricsLog(self._run, enabled=False)
        self._savers = {
            background: Saver(
                self._run, Config(run=RunConfig(async_save=background, keep_last=1)), log
            )
            for background in (True, False)
        }
        self._step = 0
        self._batch = torch.randint(8192, (8, BLOCK))

    def save(self, *, background: bool) -> float:
        """Save, and return the seconds that training waits; returns when everything is written."""
        self._step += 1
        saver = self._savers[background]
        seconds = saver.save(self._engine, replace(POSITION, step=self._step))
        saver.wait()
        return seconds

    def save_with_deepspeed(self) -> float:
        folder = self._run.root / "deepspeed"
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        self._deepspeed.save_checkpoint(str(folder), tag="x")
        return time.perf_counter() - start

    @property
    def _deepspeed(self) -> Any:
        return self._engine._engine

    @property
    def num_bytes(self) -> int:
        return _size(self._run.checkpoints)

    @property
    def deepspeed_bytes(self) -> int:
        return _size(self._run.root / "deepspeed")

    def update_seconds(self, repeats: int) -> tuple[float, float]:
        """Return the median seconds of an update alone, and of the first one after a save began."""
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(2 * (repeats + 1)):
            saver = self._savers[True]
            if number % 2:
                self._step += 1
                saver.save(self._engine, replace(POSITION, step=self._step))
            start = time.perf_counter()
            self._engine.backward(self._batch)
            self._engine.step(1e-4)
            if number > 1:
                times[number % 2].append(time.perf_counter() - start)
            saver.wait()
        return statistics.median(times[0]), statistics.median(times[1])


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="saving a run", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--density", type=float, default=0.7, help="fraction that is kept")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; the median counts")
    parser.add_argument("--folder", default=None, help="where to write; the system's by default")
    main(parser.parse_args())
