"""Find the ticket, rewind, pretrain it under DeepSpeed ZeRO. Resumes by itself.

Run `pmp-ds pretrain --help`.
"""

import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmp_ds import ranks, startup, verbosity  # the rest is imported when signals are heard already
from pmp_ds.commands import OnRanks

if TYPE_CHECKING:
    from pmp_ds.config import Config
    from pmp_ds.run_dir import RunDir
    from pmp_ds.train.pipeline import Outcome

DESCRIPTION = """\
Private Mask Pre-Training: find a sparse ticket early in training, go back to the initial weights,
and train only the ticket. What is learned is in --config, how it fits on the machine in
--deepspeed-config. The same command continues a run where it was."""

EPILOG = """\
examples:
  one process: a GPU, or the CPU
    pmp-ds pretrain --config demo
  two CPU ranks
    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m pmp_ds.launch --ranks 2 pretrain --config demo
  the paper's model on the GPUs of this machine, states sharded over them
    python -m pmp_ds.launch pretrain --config tinyllama-1.1b \\
        --deepspeed-config zero2 --data.store tokenized_data/slimpajama
  several stores in fixed proportions
    python -m pmp_ds.launch pretrain --config gpt2-small \\
        --data.store '{tokenized_data/web: 0.7, tokenized_data/code: 0.3}'
  before anything is rented: memory, traffic, disk and time, and what fits; needs no data
    pmp-ds pretrain --config tinyllama-1.1b --deepspeed-config zero2 \\
        --dry-run --world-size 8 --device-memory 80GB --device-flops 989T
  its control without a mask: an overlay, then a name of its own
    python -m pmp_ds.launch pretrain --config demo \\
        --config base --run.name demo-base"""

STARTED = time.monotonic()
"""run.max_time counts from here."""


def _text(metavar: str) -> Any:
    return field(default=None, metadata={"metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class OfDryRun(OnRanks):
    """What --dry-run assumes."""

    world_size: int | None = _text("N")
    """Ranks of the run. Default: those that are started, or 1."""

    device_memory: str | None = _text("SIZE")
    """Memory of a rank's GPU, such as 80GB: says what fits."""

    host_memory: str | None = _text("SIZE")
    """Memory of a host divided by its ranks, such as 250GB."""

    device_flops: str | None = _text("RATE")
    """Peak of a rank's GPU in FLOP/s, such as 989T: says how long the run takes."""

    mfu: float = 0.4
    """The fraction of that peak that the run reaches."""

    block_size: int | None = _text("N")
    """Tokens of a block, while data.store does not exist. Default: the longest context."""


@dataclass(frozen=True, kw_only=True)
class Options(OfDryRun):
    """How a run begins."""

    start_afresh: bool = False
    """Where the run has checkpoints and none can be read, set them aside and begin again at update
    0, with the same key and ticket."""

    dry_run: bool = False
    """Print memory, traffic, disk space and time of the run, by category and phase, and what fits;
    start and write nothing. Takes seconds for a model of any size, without GPU and data."""


def prepare(argv: Sequence[str] | None = None) -> ranks.Prepared:
    """Check what this rank can check by itself, the quick things first."""
    from pmp_ds.cli import parse
    from pmp_ds.config import Config

    argv = sys.argv[1:] if argv is None else argv
    config, options = parse(
        Config,
        argv,
        prog="pmp-ds pretrain",
        description=DESCRIPTION,
        epilog=EPILOG,
        options=Options,
    )
    verbosity.choose(options.log_level)
    if options.dry_run:
        _print_plan(config, options)
        raise SystemExit(0)
    from pmp_ds import on_fault
    from pmp_ds.restarts import is_child, run_with_restarts
    from pmp_ds.run_dir import RunDir

    run = RunDir(Path(config.run.root) / config.run.name)
    on_fault.watch(config.guard.on_fault, run.root, run.on_fault)
    if config.run.restarts and not is_child():
        again = [sys.executable, "-m", "pmp_ds.commands.pretrain", *argv]
        raise SystemExit(run_with_restarts(again, config.run.restarts))
    from pmp_ds.data.mixed_store import open_data
    from pmp_ds.engine import deepspeed_config
    from pmp_ds.log.textfile import check_folder
    from pmp_ds.log.wandb_sink import check_installed

    ds_config = deepspeed_config.read_json(options.deepspeed_config)
    deepspeed_config.merge(ds_config, config.train, int(os.environ.get("WORLD_SIZE", "1")))
    deepspeed_config.require_precision(config.train)
    store = open_data(config.data.store)
    check_folder(config.run)
    check_installed(config.run)
    from pmp_ds.train import job  # imports transformers: seconds

    job.check(config, store, run)
    # DeepSpeed calls functions of torch by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    startup.passed("imports and settings")

    def train() -> None:
        from pmp_ds import dist
        from pmp_ds.release.rehearsal import rehearse
        from pmp_ds.train import pipeline

        startup.passed("meeting")
        architecture = job.architecture(config, store, run)
        dist.on_rank0(lambda: rehearse(architecture, secret=config.init.is_drawn_in_secret))
        startup.passed("rehearsal of the release")
        outcome = pipeline.run(
            config, ds_config, store, run, STARTED, start_afresh=options.start_afresh
        )
        _tell(outcome, config, run)

    return ranks.Prepared(str(run.root), config.guard.lost_seconds, train)


def _print_plan(config: "Config", options: Options) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and os.environ.get("RANK", "0") != "0":
        return
    from pmp_ds import dist

    dist.import_deepspeed()
    from pmp_ds.engine import deepspeed_config
    from pmp_ds.train import dry_run
    from pmp_ds.train.machine import Machine, bytes_of, flops_of

    machine = Machine(
        world=started if options.world_size is None else options.world_size,
        device_memory=bytes_of(options.device_memory, "--device-memory"),
        host_memory=bytes_of(options.host_memory, "--host-memory"),
        device_flops=flops_of(options.device_flops, "--device-flops"),
        mfu=options.mfu,
        block_size=options.block_size,
    )
    ds_config = deepspeed_config.read_json(options.deepspeed_config)
    print(dry_run.describe(config, ds_config, machine), flush=True)


def _tell(outcome: "Outcome", config: "Config", run: "RunDir") -> None:
    from pmp_ds import dist
    from pmp_ds.errors import quoted

    if dist.rank() != 0:
        return
    from pmp_ds.plots import plot_run  # imports matplotlib: a second

    plot_run(run)
    if not verbosity.informs():
        return
    print(
        f"done: ticket of {outcome.num_kept:,} elements of {outcome.num_params:,}, "
        f"{outcome.complement_changed} elements of the complement changed"
    )
    if config.mask.source != "none":
        print(f"  what it keeps, for you alone: pmp-ds vault show {quoted(run.ticket)}")
    print(f"  next: pmp-ds export --run {quoted(run.root)}", flush=True)


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds pretrain` as one rank and return its exit code."""
    return ranks.command(lambda: prepare(argv), argv)


if __name__ == "__main__":
    raise SystemExit(command())
