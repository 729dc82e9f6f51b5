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

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pmp_ds import results
from pmp_ds.cli import PlainParser
from pmp_ds.errors import UserError, exit_code

NEEDS: dict[str, tuple[str, ...]] = {
    "perplexity": ("store",),
    "last_word": ("text",),
    "glue": (),
    "lm_eval": ("tasks",),
    "landscape": ("store", "ticket"),
    "gradients": ("store", "ticket"),
}
FROM_TICKET = ("landscape", "gradients")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = PlainParser("pmp-ds evaluate", __doc__)
    add = parser.add_argument
    add("measures", nargs="+", choices=NEEDS, metavar="MEASURE", help="one or several of the above")
    add("--model", type=Path, required=True, metavar="FOLDER", help="a Hugging Face causal model")
    add("--arm", metavar="NAME", help="its name in tables. Default: that of the run or folder")
    add(
        "--results",
        type=Path,
        default=Path("results.jsonl"),
        metavar="FILE",
        help="one file for all models that are compared. Default: results.jsonl in this folder",
    )
    add("--again", action="store_true", help="measure what is in --results already")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="of untrained heads and of random directions. Default: 0 1 2",
    )
    add("--batch-size", type=int, default=8, metavar="N", help="sequences at once. Default: 8")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1. Default: a GPU if there is one")

    add = parser.add_argument_group("perplexity, landscape, gradients").add_argument
    add("--store", type=Path, metavar="STORE", help="packed tokens of the model's tokenizer")
    add(
        "--split", choices=("validation", "train"), default="validation", help="Default: validation"
    )
    add(
        "--blocks",
        type=int,
        default=128,
        metavar="N",
        help="evenly spread over the split. Default: 128, or as many as there are",
    )

    add = parser.add_argument_group("landscape, gradients").add_argument
    add("--ticket", type=Path, metavar="TICKET", help="the ticket's folder, or a sealed file")
    add(
        "--mask-name",
        default="own",
        metavar="NAME",
        help="what results call the ticket, when it is not the model's own",
    )
    add("--identity", type=Path, metavar="KEY", help="what opens the sealed file")
    add(
        "--alphas",
        type=float,
        nargs="+",
        metavar="A",
        help="steps, in norms of the weights. Default: -0.5 to 0.5, denser around 0",
    )
    add(
        "--finetuned",
        type=Path,
        metavar="FOLDER",
        help="the same model fine-tuned: the way to it is a direction too",
    )

    add = parser.add_argument_group("last_word, glue, lm_eval").add_argument
    add("--text", type=Path, metavar="FILE", help=".jsonl with the field `text`, or lines of .txt")
    add("--glue-dir", type=Path, metavar="FOLDER", help="GLUE's files. Default: from the hub")
    add("--glue-tasks", nargs="+", metavar="TASK", help="cola sst2 ... Default: all eight")
    add("--tasks", nargs="+", metavar="TASK", help="tasks of the lm-eval harness")
    add("--task-dir", type=Path, metavar="FOLDER", help="task files of your own for the harness")
    add("--limit", type=int, metavar="N", help="examples of each task of the harness")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """The mistakes that can be seen at once."""
    for measure in args.measures:
        for name in NEEDS[measure]:
            if getattr(args, name) is None:
                raise UserError(f"{measure} needs --{name}; see --help")
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
        if (path := getattr(args, name)) is not None and not path.exists():
            raise UserError(f"--{name.replace('_', '-')} {path} does not exist")
    for name in ("blocks", "batch_size", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.results.is_dir():
        raise UserError(f"--results {args.results} is a folder: name a file")
    if args.results.resolve().is_relative_to(args.model.resolve()):
        raise UserError(f"--results {args.results} is inside --model {args.model}: name another")


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    check(args)
    done = {result.key for result in results.read(args.results)}  # UserError before slow imports
    ticket = _ticket(args)

    import transformers

    from pmp_ds.evaluate.subject import Subject

    transformers.logging.disable_progress_bar()
    subject = Subject.open(args.model, _device(args.device))
    arm, hardware = args.arm or results.arm_of(str(args.model)), results.hardware()
    print(f"{args.model} ({arm}), {subject.model.num_parameters():,} parameters")
    for job in list(_jobs(subject, ticket, args)):  # every mistake before the first measurement
        key = results.key(job.kind, subject.digest, job.settings)
        if key in done and not args.again:
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
        done.add(key)
        print(f"  {job.kind:<15} {_about(job.settings)}{job.words(values)}", flush=True)
    print(f"written to {args.results}")
    if ticket is not None and set(args.measures) & set(FROM_TICKET):
        print("note: landscape and gradients come from the ticket; they are for its owner's study")


def _jobs(subject: Any, ticket: Any, args: argparse.Namespace) -> Iterator[Any]:
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
                yield jobs.last_word(subject, args.text, args.batch_size)
            case "glue":
                from pmp_ds.glue.tasks import TASKS

                tasks = args.glue_tasks or list(TASKS)
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


def _ticket(args: argparse.Namespace) -> Any:
    """What --ticket holds, if a measurement needs it."""
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
    """What tells apart lines of one kind."""
    parts = [str(settings["task"])] if "task" in settings else []
    parts += [f"seed {settings['seed']}"] if "seed" in settings else []
    return f"{', '.join(parts)}: " if parts else ""


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds evaluate` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
