"""Exporting a large checkpoint with the real command: peak memory, and time against a plain copy.

    python -m benchmarks.export --folder /tmp/bench        # TinyLlama-1.1B: 7 GB of disk
    python -m benchmarks.export --folder /tmp/bench --model.num_layers 2

The checkpoint has random weights in the training dtype; nothing is trained. Memory is that of the
command and its children together: each process' resident pages, sampled every 20 ms, and the
highest mark of each. The copy is of the same weight files, read, written and fsynced.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import hardware, print_figure
from pmp_ds.cli import dump, parse
from pmp_ds.config import Config
from pmp_ds.model.keys import create_key
from pmp_ds.prepare.tokenizer import train_tokenizer
from pmp_ds.run_dir import RunDir, write_json, write_text
from pmp_ds.state import checkpoint, shelf, theta0
from pmp_ds.state.checkpoint import Position, Snapshot
from pmp_ds.state.run_record import DataFacts
from pmp_ds.state.weight_files import Layout

REPO = Path(__file__).resolve().parents[1]
RECIPE = REPO / "launcher/recipes/tinyllama-1.1b.yaml"
GOAL_BYTES = 6e9
GOAL_RATIO = 12.0


def main(options: argparse.Namespace, settings: list[str]) -> None:
    shutil.rmtree(options.folder / "runs", ignore_errors=True)
    run = _make_run(options.folder, settings)
    folder, _ = shelf.find(run) or sys.exit("no checkpoint")
    files = sorted((folder / "weights").glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    print(f"hardware: {hardware(torch.device('cpu'))}, {os.cpu_count()} cores")
    copy = _copy_seconds(files, options.folder / "copy")
    seconds, peak, marks = _export(run)
    copy = min(copy, _copy_seconds(files, options.folder / "copy"))
    print(
        f"{total / 1e9:.2f} GB of weights: export {seconds:.1f} s, copy {copy:.2f} s, highest "
        f"marks of single processes {', '.join(f'{mark / 1e9:.2f}' for mark in marks)} GB"
    )
    print_figure("export_peak_gb", peak / 1e9, GOAL_BYTES / 1e9)
    print_figure("export_time_vs_copy", seconds / copy, GOAL_RATIO)
    if not options.keep:
        shutil.rmtree(run.root)


def _make_run(folder: Path, settings: list[str]) -> RunDir:
    """Make a run that looks finished: settings, tokenizer, and one checkpoint of random weights."""
    config, _ = parse(Config, ["--config", str(RECIPE), "--data.store", "none", *settings])
    config = replace(config, run=replace(config.run, root=str(folder / "runs")))
    run = RunDir(folder / "runs" / config.run.name)
    run.create()
    write_text(run.config, dump(config))
    data = DataFacts(
        dataset_id="d" * 64,
        vocab_size=config.model.vocab_size or 32000,
        eos_id=2,
        block_size=256,
        unigram_cross_entropy=7.0,
        documents=1,
        tokens=256,
        sources=("none",),
    )
    write_json(run.data, asdict(data))
    train_tokenizer(["a few words of text to train on"] * 200, 300).save_pretrained(run.tokenizer)
    theta0.remember(run, "0" * 64, create_key(run.init))
    architecture = theta0.architecture(config, data, run)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    generator = torch.Generator().manual_seed(0)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, param in model.named_parameters():
            drawn = torch.randn(param.shape, generator=generator).mul_(0.02)
            yield name, drawn.bfloat16()

    position = Position(
        step=config.train.steps,
        consumed_samples=0,
        ticket_id=None,
        dataset_id="d" * 64,
        val_loss=None,
    )
    layout = Layout.of({name: 2 * param.numel() for name, param in model.named_parameters()})
    snapshot = Snapshot(position, architecture, layout, weights(), None, {}, layout.num_bytes)
    checkpoint.write(run, snapshot)
    return run


def _export(run: RunDir) -> tuple[float, int, list[int]]:
    """Return seconds, the peak bytes of all processes together, and the peak of each process."""
    start = time.perf_counter()
    command = [sys.executable, str(REPO / "launcher/export.py"), "--run", str(run.root)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(REPO)})
    tree, peak = psutil.Process(process.pid), 0
    marks: dict[int, int] = {}
    while process.poll() is None:
        now = 0
        try:
            for each in (tree, *tree.children(recursive=True)):
                now += each.memory_info().rss
                marks[each.pid] = max(marks.get(each.pid, 0), _high_mark(each.pid))
        except (psutil.Error, OSError, LookupError):
            continue  # it ended meanwhile
        peak = max(peak, now)
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"the export failed with exit code {process.returncode}")
    return time.perf_counter() - start, peak, sorted(marks.values())


def _high_mark(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise LookupError(pid)


def _copy_seconds(files: list[Path], target: Path) -> float:
    target.mkdir(exist_ok=True)
    start = time.perf_counter()
    for path in files:
        with open(shutil.copyfile(path, target / path.name), "rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where 7 GB have room")
    parser.add_argument("--keep", action="store_true", help="keep the run and its release")
    main(*parser.parse_known_args())
