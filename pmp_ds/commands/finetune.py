"""Fine-tune a released model on a task, with its ticket or without. Resumes by itself.

Run `pmp-ds finetune --help`.
"""

import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pmp_ds import ranks, verbosity  # the rest is imported when signals are heard already
from pmp_ds.commands import OnRanks

DESCRIPTION = """\
Fine-tune a released model on a GLUE task or on packed text, and append what came out to
results.jsonl. The same command continues where it was; a finished cell of a sweep is never run
again."""

EPILOG = """\
examples:
  with the ticket, as its owner or a partner (docs/VAULT.md)
    pmp-ds finetune --model release --task sst2 --method ticket \\
        --ticket partner.age --identity key.txt
  without it: all weights, or LoRA, over a grid of learning rates and seeds
    python -m pmp_ds.launch finetune --model runs/demo/release --task sst2 \\
        --sweep method=full,lora,lr=1e-5,1e-4,1e-3,epochs=1,3,seed=0,1,2
  next-token prediction on a store made with the model's tokenizer
    python -m pmp_ds.launch finetune --model runs/demo/release --task lm \\
        --data.store tokenized_data/novels --train.steps 500"""

STARTED = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Options(OnRanks):
    """What is run, beside the settings of one fine-tuning."""

    sweep: tuple[str, ...] = field(default=(), metadata={"metavar": "SETTING=A,B,..."})
    """Run a grid: every combination of these values of any settings, as in
    lr=1e-5,1e-4,seed=0,1; may be repeated."""

    keep_models: bool = False
    """Keep the fine-tuned model of every cell of a sweep; without a sweep it is kept."""

    start_afresh: bool = False
    """Where a fine-tuning has checkpoints and none can be read, set them aside and begin it
    again."""


def prepare(argv: Sequence[str] | None = None) -> ranks.Prepared:
    """Check what this rank can check by itself, the quick things first."""
    from pmp_ds.cli import parse
    from pmp_ds.finetune.config import FinetuneConfig

    argv = sys.argv[1:] if argv is None else argv
    texts = {"prog": "pmp-ds finetune", "description": DESCRIPTION, "epilog": EPILOG}

    def settings(argv: Sequence[str]) -> tuple[FinetuneConfig, Options]:
        return parse(FinetuneConfig, argv, options=Options, **texts)

    config, options = settings(argv)
    verbosity.choose(options.log_level)
    from pmp_ds import on_fault
    from pmp_ds.engine import deepspeed_config
    from pmp_ds.log.textfile import check_folder
    from pmp_ds.log.wandb_sink import check_installed
    from pmp_ds.run_dir import RunDir

    run = RunDir(Path(config.run.root) / config.run.name)
    on_fault.watch(config.guard.on_fault, run.root, run.on_fault)
    check_folder(config.run)
    check_installed(config.run)
    ds_config = deepspeed_config.read_json(options.deepspeed_config)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    train = config.train.complete(config.train.global_batch_size, world)
    deepspeed_config.merge(ds_config, train, world)
    deepspeed_config.require_precision(train)
    from pmp_ds.finetune import sweep  # imports transformers: seconds

    grid = sweep.grid(options.sweep)
    cells = {name: settings([*argv, *flags])[0] for name, flags in sweep.cells(grid).items()}
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    where = Path(config.results) if config.results else run.root / "results.jsonl"
    keep, afresh = options.keep_models or not grid, options.start_afresh

    def tune() -> None:
        sweep.run_all(cells, ds_config, run, where, STARTED, keep_models=keep, start_afresh=afresh)

    return ranks.Prepared(str(run.root), config.guard.lost_seconds, tune)


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds finetune` as one rank and return its exit code."""
    return ranks.command(lambda: prepare(argv), argv)


if __name__ == "__main__":
    raise SystemExit(command())
