"""The command `pmp-ds`: its verbs, each a module of this package with a ``command(argv)``.

    pmp-ds pretrain --config demo                             the console command
    deepspeed --module pmp_ds.commands.pretrain ...           the same on several ranks
    deepspeed launcher/pretrain.py ...                        the same from a checkout

Light: a verb is imported when it is called.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pmp_ds import __version__
from pmp_ds.errors import UserError, did_you_mean, exit_code
from pmp_ds.settings import refuse_secret
from pmp_ds.verbosity import Level


@dataclass(frozen=True, kw_only=True)
class OnRanks:
    """Settings of this machine."""

    deepspeed_config: Path = field(default=Path("zero1"), metadata={"metavar": "JSON"})
    """DeepSpeed settings for this machine: a file, or zero0, zero1, zero2, ..."""

    log_level: Level = "info"
    """`warning` hides plan, progress and notes; `debug` shows DeepSpeed's messages too."""

    local_rank: int = field(default=0, metadata={"hidden": True})
    """Given by the `deepspeed` launcher, which also sets LOCAL_RANK."""


VERBS = {
    "prepare-data": "turn text into the packed token blocks that training reads",
    "pretrain": "find the ticket, rewind, and train it",
    "doctor": "check machines, network and data before a run",
    "status": "say how runs are doing; for people, monitoring and probes",
    "export": "turn a run into a Hugging Face folder without the mask",
    "finetune": "fine-tune a release, with its ticket or without",
    "evaluate": "measure what a model can do, its loss landscape and gradients",
    "audit": "attack a release as others would",
    "vault": "seal tickets for partners, and trace one that leaked",
    "backup": "seal a run's key, ticket and ledger for its owner",
    "restore": "write what a backup holds into a run's folder",
    "report": "sum up a run or a study",
    "study": "run a whole study: arms, fine-tunings, measurements, report",
}

HELP = """\
usage: pmp-ds COMMAND [options]

Private Mask Pre-Training on DeepSpeed.

{verbs}

pmp-ds COMMAND --help explains each. From text to a release:

  pmp-ds prepare-data --train-vocab-size 2048 --val-fraction 0.05 --out tokenized_data/demo
  pmp-ds pretrain --config demo
  pmp-ds export --run runs/demo
  pmp-ds report --run runs/demo

On several GPUs: `python -m pmp_ds.launch pretrain ...`, one rank for each; or
`deepspeed --module pmp_ds.commands.pretrain ...`. `finetune` likewise."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words[0].replace("_", "-") if words else "--help"
    if verb in VERBS:
        return int(importlib.import_module(module_of(verb)).command(words[1:]))
    return exit_code(lambda: _without_verb(verb))


def module_of(verb: str) -> str:
    """Return `pmp_ds.commands.prepare_data` for `prepare-data`, which launchers start."""
    return f"{__name__}.{verb.replace('-', '_')}"


def _without_verb(word: str) -> None:
    if word in ("-h", "--help"):
        width = max(map(len, VERBS)) + 2
        print(HELP.format(verbs="\n".join(f"  {v:<{width}}{VERBS[v]}" for v in VERBS)))
    elif word == "--version":
        print(__version__)
    else:
        refuse_secret(word, "pmp-ds")
        guess = did_you_mean(word, VERBS)
        raise UserError(f"unknown command {word}{guess}; pmp-ds --help lists them all")
