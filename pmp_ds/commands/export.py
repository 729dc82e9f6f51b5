"""Turn a run into a mask-free Hugging Face folder.

    pmp-ds export --run runs/demo
    pmp-ds export --run runs/demo --prompt "def main("
    pmp-ds export --run runs/demo --checkpoint 500 --private --out /tmp/step-500
    pmp-ds export --check runs/demo/release
    pmp-ds export --derivative tuned --base runs/demo/release \\
        --ticket runs/demo/private/ticket --store tokenized_data/demo --out tuned-release

The folder holds dense weights, config, tokenizer, model card and SHA256SUMS, and nothing that
names the ticket. It has been loaded in a fresh process before it gets its name. What has left is
remembered in private/ledger.jsonl: a second revision would show the mask, and is refused.
"""

import argparse
import contextlib
import datetime
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmp_ds.cli import PlainParser
from pmp_ds.errors import UserError, exit_code, shown
from pmp_ds.foreign import read_text
from pmp_ds.run_dir import RunDir, make_private
from pmp_ds.state.run_record import export_facts, load_config, read_data

if TYPE_CHECKING:
    from pmp_ds.release.export import ExportSummary


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = PlainParser("pmp-ds export", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="FOLDER", help="a run's folder, runs/NAME")
    what.add_argument(
        "--derivative",
        type=Path,
        metavar="FOLDER",
        help="a Hugging Face folder, fine-tuned from --base with --ticket: its frozen elements "
        "get changes like the ticket's, so that the two together do not show the mask",
    )
    what.add_argument(
        "--check", type=Path, metavar="FOLDER", help="only hold a finished folder against the list"
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        default="latest",
        metavar="latest|STEP|init",
        help="which weights: the newest checkpoint, that of an update, or the initial weights "
        "(private, for research; needs --out). Default: latest",
    )
    add("--out", type=Path, metavar="FOLDER", help="a new folder. Default: runs/NAME/release")
    add("--private", action="store_true", help="not to leave: 0700, any update, not in the ledger")
    add(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="fp32: only of fp32 runs; fp16: of fp16 or fp32 runs",
    )
    add("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file, such as 5GB")
    add("--license", metavar="ID", help="licence for the model card, such as apache-2.0")
    add(
        "--language",
        action="append",
        default=[],
        metavar="CODE",
        help="language of the data for the model card, such as en; once for each",
    )
    add(
        "--dataset",
        action="append",
        default=[],
        metavar="OWNER/NAME",
        help="data set on the Hugging Face hub for the model card, once for each. Default: the "
        "`hf:` inputs of the data",
    )
    add("--sign", type=Path, metavar="PEM", help="private key: sign the folder (extra `sign`)")
    add("--prompt", metavar="TEXT", help="let the release continue TEXT at the end")
    add("--base", type=Path, metavar="FOLDER", help="of --derivative: the release it came from")
    add("--ticket", type=Path, metavar="FOLDER", help="of --derivative: the run's own ticket")
    add("--store", type=Path, help="of --derivative: measure the loss on its validation blocks")
    add("--blocks", type=int, default=64, metavar="N", help="of --store. Default: 64")
    add(
        "--another-revision",
        metavar="REASON",
        help="let a second release of the same initial weights or an intermediate one leave, "
        "although it can show the mask; REASON goes into the ledger",
    )
    add(
        "--allow-public-mask",
        action="store_true",
        help="release a run whose initial weights came from init.seed, so that anyone can compute "
        "its mask",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.check is not None:
        from pmp_ds.release.allow_list import require_clean

        require_clean(args.check)
        print(f"{args.check}: nothing in it but what a release may hold")
        return
    from pmp_ds.release.model_card import check_metadata

    check_metadata(args.language, args.dataset)
    if args.sign is not None:
        from pmp_ds.release.signing import require_signing

        require_signing(args.sign)
    summary = _export_run(args) if args.run is not None else _export_derivative(args)
    print(
        f"{summary.out}: {summary.num_params:,} parameters, {summary.total_bytes / 1e6:,.1f} MB "
        f"in {summary.dtype}, {len(summary.files)} files"
    )
    same = "the same logits" if summary.logits_difference == 0 else "logits within rounding"
    print(f"loaded in a fresh process without pmp_ds: same bytes, {same}")
    if args.checkpoint == "init" or args.private:
        print(
            "warning: these weights and those of another update together are the mask: keep them "
            "private",
            file=sys.stderr,
        )
    elif args.license is None:
        print(
            "warning: the model card names no licence, so nobody knows what they may do with the "
            "release: name one with --license, such as apache-2.0",
            file=sys.stderr,
        )
    if args.prompt is not None:
        from pmp_ds.release.export import generate_sample

        print(generate_sample(summary.out, args.prompt))


def _export_run(args: argparse.Namespace) -> "ExportSummary":
    run = RunDir(args.run)
    _check_run(args, run)
    initial = args.checkpoint == "init"
    private = initial or args.private
    config = load_config(run)
    public = config.init.seed is not None and config.mask.source != "none"
    if public and not (args.allow_public_mask or private):
        raise UserError(
            f"{args.run} started from the public seed init.seed, so anyone can compute its mask: "
            "train with init.seed unset, or pass --allow-public-mask to release it as it is"
        )
    # Slow imports come after the quick checks.
    from pmp_ds.release.export import export, require_absent
    from pmp_ds.release.ledger import Claim
    from pmp_ds.release.model_card import CardFacts
    from pmp_ds.state import plain_weights, theta0

    out = args.out or run.release
    require_absent(out)
    with contextlib.ExitStack() as stack:
        if initial:
            # After a kill the next pretrain.py sweeps it.
            scratch = stack.enter_context(
                tempfile.TemporaryDirectory(dir=run.init, prefix=".", suffix=".incomplete")
            )
            weights = plain_weights.of_init(run, Path(scratch) / "weights")
        else:
            step = None if args.checkpoint == "latest" else int(args.checkpoint)
            weights = plain_weights.of_checkpoint(run, step)
        data = read_data(run)
        facts = export_facts(run, weights.updates, weights.val_loss)
        card = CardFacts(**facts, date=_today(), **_metadata(args))
        claim = None
        if config.mask.source != "none" and not (public or private):
            claim = Claim(
                path=run.ledger,
                lineage=theta0.proven_lineage(run),
                kind="final" if weights.updates >= config.train.steps else "intermediate",
                updates=weights.updates,
                date=card.date,
                reason=args.another_revision,
            )
            _require_ledger(run, args.another_revision)
        return export(
            weights.folder,
            out,
            tokenizer_dir=run.tokenizer,
            card=card,
            private=private,
            vocab_size=data.vocab_size,
            leading_bos=data.bos_id is not None,
            claim=claim,
            **_form(args),
        )


def _require_ledger(run: RunDir, reason: str | None) -> None:
    if run.release.exists() and not run.ledger.exists() and reason is None:
        raise UserError(
            f"{run.ledger} is missing, and {run.release} has left: put it back from a backup, as "
            "nobody else knows what has left before, or say why this one must leave: "
            "--another-revision REASON"
        )


def _export_derivative(args: argparse.Namespace) -> "ExportSummary":
    for flag in ("base", "ticket", "out"):
        if getattr(args, flag) is None:
            raise UserError(f"--derivative needs --{flag}")
    from pmp_ds.derivative.derivative import loss_on, write_dithered
    from pmp_ds.release.export import export, require_absent
    from pmp_ds.release.ledger import Claim, lineage_of, read
    from pmp_ds.release.model_card import DerivativeFacts
    from pmp_ds.release.source import open_source
    from pmp_ds.state import theta0

    require_absent(args.out)
    run = RunDir(args.ticket.resolve().parent.parent)
    if run.ticket != args.ticket.resolve() or not theta0.is_known(run):
        raise UserError(
            f"--ticket {args.ticket} is not the ticket of a run, runs/NAME/private/ticket: "
            "derivatives are released by the run's owner; dithered with a recipient's copy, a "
            "model would no longer show whose it is"
        )
    ledger = run.ledger
    base = open_source(args.base)
    lineage = lineage_of(read(ledger), base.digest())
    base.close()
    title = re.search(r"^# (.+)$", read_text(args.base / "README.md"), re.MULTILINE)
    name = shown(title[1]) if title else args.base.resolve().name
    tokenizer = args.derivative if list(args.derivative.glob("tokenizer.*")) else args.base
    with tempfile.TemporaryDirectory(dir=args.ticket, prefix=".dither-") as scratch:
        weights = Path(scratch) / "weights"
        write_dithered(args.derivative, args.base, args.ticket, weights)
        if args.store is None:
            print("what the dither costs in loss was not measured: name a --store")
        else:
            before, after = (
                loss_on(folder, args.store, args.blocks) for folder in (args.derivative, weights)
            )
            print(
                f"dither: {before:.4f} -> {after:.4f} nats per token ({after - before:+.4f}) on "
                f"{args.blocks} validation blocks of {args.store}"
            )
        today = _today()
        card = DerivativeFacts(name=args.out.name, base=name, date=today, **_metadata(args))
        claim = Claim(
            path=ledger,
            lineage=lineage,
            kind="derivative",
            updates=None,
            date=today,
            reason=args.another_revision,
        )
        return export(
            weights, args.out, tokenizer_dir=tokenizer, card=card, claim=claim, **_form(args)
        )


def _metadata(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "license": args.license,
        "languages": tuple(args.language),
        "datasets": tuple(args.dataset),
    }


def _form(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": args.dtype,
        "max_shard_size": args.max_shard_size,
        "signing_key": args.sign,
    }


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _check_run(args: argparse.Namespace, run: RunDir) -> None:
    if not run.private.is_dir():
        raise UserError(f"--run {args.run} is not a run: {run.private} does not exist")
    make_private(run.private)
    which = args.checkpoint
    if which not in ("latest", "init") and not which.isdecimal():
        raise UserError(f"--checkpoint {which} is neither `latest`, an update's number, nor `init`")
    if which == "init" or args.private:
        given = "--private" if args.private else "--checkpoint init"
        release = run.release.resolve()
        if args.out is None:
            raise UserError(
                f"{given} needs --out: such weights beside a release show its mask, so they never "
                "go to the release folder by default"
            )
        target = args.out.resolve()
        if target == release or release in target.parents:
            raise UserError(
                f"--out {args.out} is inside {run.release}, which leaves: initial weights there "
                "would show the mask. Name a private folder"
            )


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds export` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
