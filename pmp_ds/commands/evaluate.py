"""Measure a model: what it can do, and, with its ticket, its loss landscape and gradients.

    pmp-ds evaluate perplexity --model runs/demo/release --store tokenized_data/demo
    pmp-ds evaluate last_word --model runs/demo/release --text lambada.jsonl
    pmp-ds evaluate glue --model runs/demo/release --glue-dir glue --glue-tasks sst2 rte
    pmp-ds evaluate lm_eval --model runs/demo/release --tasks arc_easy piqa
    pmp-ds evaluate perplexity landscape gradients --model runs/demo/release \\
        --store tokenized_data/demo --ticket runs/demo/private/ticket

  perplexity  loss, perplexity, bits per byte on a packed store
  last_word   is the last word of a text what greedy decoding gives? (LAMBADA)
  glue        zero-shot, and an untrained head for each seed (the paper's Base rows)
  lm_eval     tasks of the lm-eval harness (pip install 'pmp_ds[eval]')
  landscape   loss along random directions in, across and outside the ticket (Figure 5)
  gradients   sizes of gradients in the ticket and outside (Figure 6)

Appends a line for each measurement to --results. What stands there already, of the same weights
with the same settings, is not measured again. docs/EVALUATION.md explains each.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pmp_ds import results
from pmp_ds.cli import option, parse_options
from pmp_ds.errors import UserError, did_you_mean, exit_code, require

NEEDS: dict[str, tuple[str, ...]] = {
    "perplexity": ("store",),
    "last_word": ("text",),
    "glue": (),
    "lm_eval": ("tasks",),
    "landscape": ("store", "ticket"),
    "gradients": ("store", "ticket"),
}
FROM_TICKET = ("landscape", "gradients")


@dataclass(frozen=True, kw_only=True)
class OnText:
    """For perplexity, landscape and gradients."""

    store: Path | None = option("STORE", None)
    """Packed tokens of the model's tokenizer."""

    split: Literal["validation", "train"] = "validation"
    """The part of the store that is read."""

    blocks: int = 128
    """Blocks read, evenly spread over the split, or as many as there are."""


@dataclass(frozen=True, kw_only=True)
class OfTicket:
    """For landscape and gradients."""

    ticket: Path | None = option("TICKET", None)
    """The ticket's folder, or a sealed file."""

    mask_name: str = option("NAME", "own")
    """What results call the ticket, when it is not the model's own."""

    identity: Path | None = option("KEY", None)
    """The secret key that opens the sealed file."""

    alphas: tuple[float, ...] = option("A", ())
    """Steps, in norms of the weights. Default: -0.5 to 0.5, denser around 0."""

    finetuned: Path | None = option("FOLDER", None)
    """The same model fine-tuned: the way to it is a direction too."""


@dataclass(frozen=True, kw_only=True)
class OnTasks:
    """For last_word, glue and lm_eval."""

    text: Path | None = option("FILE", None)
    """A .jsonl file with the field `text`, or a .txt file with a text on each line."""

    glue_dir: Path | None = option("FOLDER", None)
    """GLUE's files. Default: from the hub."""

    glue_tasks: tuple[str, ...] = option("TASK", ())
    """GLUE tasks: cola sst2 ... Default: all eight."""

    tasks: tuple[str, ...] = option("TASK", ())
    """Tasks of the lm-eval harness."""

    task_dir: Path | None = option("FOLDER", None)
    """Task files of your own for the harness."""

    limit: int | None = None
    """Examples of each task of the harness. Default: all."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(OnText, OfTicket, OnTasks):
    """What is measured on which model."""

    measures: tuple[str, ...] = option("MEASURE", positional=True)
    """One or several of the above."""

    model: Path = option("FOLDER")
    """A Hugging Face causal model."""

    arm: str | None = option("NAME", None)
    """Its name in tables. Default: that of the run or folder."""

    results: Path = option("FILE", Path("results.jsonl"))
    """One file for all models that are compared."""

    again: bool = False
    """Measure what is in --results already."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of untrained heads and of random directions."""

    batch_size: int = 8
    """Sequences at once."""

    device: str | None = option("NAME", None)
    """cpu, cuda, cuda:1. Default: a GPU if there is one."""

    def __post_init__(self) -> None:
        for measure in self.measures:
            require(
                measure in NEEDS,
                f"unknown measure {measure!r}{did_you_mean(measure, NEEDS)}; the measures are "
                f"{', '.join(NEEDS)}",
            )
            for name in NEEDS[measure]:
                require(bool(getattr(self, name)), f"{measure} needs --{name}; see --help")
        for name in ("blocks", "batch_size", "limit"):
            value = getattr(self, name)
            require(
                value is None or value >= 1,
                f"--{name.replace('_', '-')} {value} must be at least 1",
            )
        for seed in self.seeds:
            require(seed >= 0, f"--seeds {seed} must not be negative")


def _check_paths(args: Evaluate) -> None:
    for name in (
        "model",
        "store",
        "ticket",
        "identity",
        "finetuned",
        "text",
        "glue_dir",
        "task_dir",
    ):
        path, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        require(path is None or path.exists(), f"{flag} {path} does not exist")
    require(not args.results.is_dir(), f"--results {args.results} is a folder: name a file")
    require(
        not args.results.resolve().is_relative_to(args.model.resolve()),
        f"--results {args.results} is inside --model {args.model}: name another",
    )


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_options(Evaluate, argv, prog="pmp-ds evaluate", description=__doc__)
    _check_paths(args)
    known = {one.key: one for one in results.read(args.results)}  # UserError before slow imports
    ticket = _ticket(args)

    import transformers

    from pmp_ds.evaluate.subject import Subject

    transformers.logging.disable_progress_bar()
    subject = Subject.open(args.model, _device(args.device))
    arm, hardware = args.arm or results.arm_of(str(args.model)), results.hardware()
    print(f"{args.model} ({arm}), {subject.model.num_parameters():,} parameters")
    for job in list(_jobs(subject, ticket, args)):  # every mistake before the first measurement
        done = results.find(known, job.kind, subject.digest, job.settings)
        if done is not None and not args.again:
            print(f"  {job.kind:<15} {_about(job.settings)}already in {args.results}")
            continue
        start = time.perf_counter()
        values = job.run()
        result = results.Result(
            kind=job.kind,
            arm=arm,
            model=str(args.model),
            model_digest=subject.digest,
            settings=job.settings,
            values=values,
            seconds=round(time.perf_counter() - start, 3),
            hardware=hardware,
        )
        results.append(args.results, result)
        known[result.key] = result
        print(f"  {job.kind:<15} {_about(job.settings)}{job.words(values)}", flush=True)
    print(f"written to {args.results}")
    if ticket is not None and set(args.measures) & set(FROM_TICKET):
        print("note: landscape and gradients come from the ticket; they are for its owner's study")


def _jobs(subject: Any, ticket: Any, args: Evaluate) -> Iterator[Any]:
    from pmp_ds.evaluate import jobs, ticket_jobs
    from pmp_ds.evaluate.landscape import ALPHAS

    if args.store is not None:
        from pmp_ds.data.arrow_store import Store

        text = jobs.Text(Store.open(args.store), args.split, args.blocks, args.batch_size)
    for measure in dict.fromkeys(args.measures):
        match measure:
            case "perplexity":
                yield jobs.perplexity(subject, text)
            case "last_word":
                assert args.text is not None
                yield jobs.last_word(subject, args.text, args.batch_size)
            case "glue":
                from pmp_ds.glue.tasks import TASKS

                tasks = args.glue_tasks or tuple(TASKS)
                yield from jobs.glue(subject, tasks, args.glue_dir, args.seeds, args.batch_size)
            case "lm_eval":
                yield from jobs.lm_eval(
                    subject, args.tasks, args.task_dir, args.limit, args.batch_size
                )
            case "landscape":
                yield ticket_jobs.landscape(
                    subject,
                    text,
                    ticket,
                    args.mask_name,
                    args.alphas or ALPHAS,
                    args.seeds,
                    args.finetuned,
                )
            case "gradients":
                yield ticket_jobs.gradients(subject, text, ticket, args.mask_name)


def _ticket(args: Evaluate) -> Any:
    """Return the ticket of --ticket, if a measurement needs it."""
    if args.ticket is None or not set(args.measures) & set(FROM_TICKET):
        return None
    from pmp_ds.ticket.keys import identities
    from pmp_ds.ticket.vault import any_ticket

    return any_ticket(args.ticket, identities(args.identity) if args.identity else None)


def _device(name: str | None) -> str:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return str(device)


def _about(settings: dict[str, Any]) -> str:
    """Return the words that distinguish lines of one kind."""
    parts = [str(settings["task"])] if "task" in settings else []
    parts += [f"seed {settings['seed']}"] if "seed" in settings else []
    return f"{', '.join(parts)}: " if parts else ""


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds evaluate` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
