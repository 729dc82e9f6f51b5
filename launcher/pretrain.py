"""Find the ticket, rewind, pretrain it under DeepSpeed ZeRO. Resumes by itself.

Run `deepspeed launcher/pretrain.py --help`.
"""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from pmp_ds import dist
from pmp_ds.cli import HIDDEN, parse
from pmp_ds.config import Config
from pmp_ds.data.arrow_store import Store
from pmp_ds.data.mixed_store import MixedStore, open_data
from pmp_ds.errors import EXIT_MISTAKE, LostRankError, exit_code
from pmp_ds.restarts import is_child, run_with_restarts
from pmp_ds.run_dir import RunDir
from pmp_ds.train import deepspeed_config
from pmp_ds.train.shelf import AFRESH

DESCRIPTION = """\
Private Mask Pre-Training: find a sparse ticket early in training, go back to the initial weights,
and train only the ticket. What is learned is in --config, how it fits on the machine in
--deepspeed-config. The same command continues a run where it was."""

EPILOG = """\
examples:
  two CPU ranks
    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_accelerators 2 launcher/pretrain.py \\
        --config launcher/recipes/demo.yaml
  the paper's model on the GPUs of this machine, states sharded over them
    deepspeed launcher/pretrain.py --config launcher/recipes/tinyllama-1.1b.yaml \\
        --deepspeed-config ds_configs/zero2.json --data.store tokenized_data/slimpajama
  several stores in fixed proportions
    deepspeed launcher/pretrain.py --config launcher/recipes/gpt2-small.yaml \\
        --data.store '{tokenized_data/web: 0.7, tokenized_data/code: 0.3}'
  its control without a mask: an overlay, then a name of its own
    deepspeed launcher/pretrain.py --config launcher/recipes/demo.yaml \\
        --config launcher/recipes/base.yaml --run.name demo-base"""

OTHER_RANKS_WAIT = 20.0
"""Seconds. The launcher kills all ranks when one has failed: rank 0, which says why, goes first."""

STARTED = time.monotonic()
"""run.max_time counts from here."""

DEFAULT_DS_CONFIG = Path(__file__).resolve().parents[1] / "ds_configs" / "zero1.json"


def main() -> None:
    config, options = parse(
        Config,
        sys.argv[1:],
        prog="pretrain.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        options={
            "--deepspeed-config": {
                "type": str,
                "default": str(DEFAULT_DS_CONFIG),
                "metavar": "JSON",
                "help": "DeepSpeed settings for this machine: one of ds_configs/, or your own",
            },
            AFRESH: {
                "action": "store_true",
                "help": "where the run has checkpoints and none can be read, set them aside and "
                "begin again at update 0, with the same key and ticket",
            },
            "--local_rank": {"type": int, "default": 0, "help": HIDDEN},
        },
    )
    if config.run.restarts and not is_child():
        command = [sys.executable, *sys.argv]
        raise SystemExit(run_with_restarts(command, config.run.restarts))
    # What every rank can find by itself is checked before they meet, the quick checks first.
    ds_config = deepspeed_config.read_json(Path(options["deepspeed_config"]))
    deepspeed_config.merge(ds_config, config.train, int(os.environ.get("WORLD_SIZE", "1")))
    store = open_data(config.data.store)
    run = RunDir(Path(config.run.root) / config.run.name)
    from pmp_ds.train import job  # imports transformers: seconds

    job.check(config, store, run)
    # DeepSpeed calls functions of torch by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    dist.init()
    try:
        _run(config, ds_config, store, run, options["start_afresh"])
    except RuntimeError as error:
        if not dist.is_lost_rank(error):
            raise
        raise LostRankError(
            "another rank is gone; the last checkpoint is intact, the same command goes on from it"
        ) from error
    finally:
        dist.shutdown()


def _run(
    config: Config,
    ds_config: dict[str, Any],
    store: Store | MixedStore,
    run: RunDir,
    start_afresh: bool,
) -> None:
    from pmp_ds.plots import plot_run  # imports matplotlib: a second
    from pmp_ds.train import pipeline, plan, run_facts
    from pmp_ds.train.job import open_job

    # Rank 0 alone reads every byte; a damaged store stops all ranks before anything is written.
    dist.on_rank0(lambda: store.verify() and None)
    dist.on_rank0(lambda: run_facts.claim(run, config, store))
    job = open_job(config, ds_config, store, run)
    if dist.rank() == 0:
        print(f"{config.run.name}:\n{plan.describe(job)}", flush=True)
    outcome = pipeline.pretrain(job, STARTED, start_afresh=start_afresh)
    if dist.rank() == 0:
        plot_run(run)
        print(
            f"done: ticket of {outcome.num_kept:,} elements of {outcome.num_params:,}, "
            f"{outcome.complement_changed} elements of the complement changed"
        )
        if config.mask.source != "none":
            print(f"  what it keeps, for you alone: python launcher/vault.py show {run.ticket}")
        print(f"  next: python launcher/export.py --run {run.root}", flush=True)


if __name__ == "__main__":
    dist.adopt_slurm()
    code = exit_code(main)
    if code == EXIT_MISTAKE and os.environ.get("RANK", "0") != "0":
        time.sleep(OTHER_RANKS_WAIT)
    raise SystemExit(code)
