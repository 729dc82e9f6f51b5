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

import contextlib
import dataclasses
import datetime
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmp_ds.cli import option, parse_options
from pmp_ds.config.precision import PRECISIONS
from pmp_ds.errors import UserError, exit_code, require, require_known, shown
from pmp_ds.foreign import read_text
from pmp_ds.run_dir import RunDir, make_private
from pmp_ds.state.run_record import export_facts, load_config, read_data

if TYPE_CHECKING:
    from pmp_ds.release.export import ExportSummary


@dataclass(frozen=True, kw_only=True)
class OfDerivative:
    """For --derivative."""

    base: Path | None = option("FOLDER", None)
    """The release that it came from."""

    ticket: Path | None = option("FOLDER", None)
    """The run's own ticket."""

    store: Path | None = option("STORE", None)
    """Measure the loss on the validation blocks of this store."""

    blocks: int = 64
    """How many of those blocks."""


@dataclass(frozen=True, kw_only=True)
class Export(OfDerivative):
    """What leaves, and in which form."""

    run: Path | None = option("FOLDER", None)
    """A run's folder, runs/NAME."""

    derivative: Path | None = option("FOLDER", None)
    """A Hugging Face folder, fine-tuned from --base with --ticket: its frozen elements get changes
    like the ticket's, so that the two together do not show the mask."""

    check: Path | None = option("FOLDER", None)
    """Only check a finished folder against the list of what a release may hold."""

    checkpoint: str = option("latest|STEP|init", "latest")
    """Which weights: the newest checkpoint, that of an update, or the initial weights (private, for
    research; needs --out)."""

    out: Path | None = option("FOLDER", None)
    """A new folder. Default: runs/NAME/release."""

    private: bool = False
    """Not to leave: 0700, any update, not in the ledger."""

    dtype: str = dataclasses.field(default="bf16", metadata={"choices": PRECISIONS})
    """Precision of the weights. fp32: only of fp32 runs; fp16: of fp16 or fp32 runs."""

    max_shard_size: str = option("SIZE", "5GB")
    """Largest weight file."""

    license: str | None = option("ID", None)
    """Licence for the model card, such as apache-2.0."""

    language: tuple[str, ...] = option("CODE", ())
    """Languages of the data for the model card, such as en."""

    dataset: tuple[str, ...] = option("OWNER/NAME", ())
    """Data sets on the Hugging Face hub for the model card. Default: the `hf:` inputs of the
    data."""

    sign: Path | None = option("PEM", None)
    """Private key: sign the folder (extra `sign`)."""

    prompt: str | None = None
    """Let the release continue this text at the end."""

    another_revision: str | None = option("REASON", None)
    """Let a second release of the same initial weights or an intermediate one leave, although it
    can show the mask; the reason goes into the ledger."""

    allow_public_mask: bool = False
    """Release a run whose initial weights came from init.seed, so that anyone can compute its
    mask."""

    def __post_init__(self) -> None:
        given = [one for one in (self.run, self.derivative, self.check) if one is not None]
        require(len(given) == 1, "name one of --run, --derivative and --check; see --help")
        require_known("--dtype", self.dtype, PRECISIONS, "precisions")
        require(self.blocks >= 1, f"--blocks {self.blocks} must be at least 1")
        which = self.checkpoint
        require(
            which in ("latest", "init") or which.isdecimal(),
            f"--checkpoint {which} is neither `latest`, an update's number, nor `init`",
        )


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_options(Export, argv, prog="pmp-ds export", description=__doc__)
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
    if args.derivative is not None:
        summary = _export_derivative(args, args.derivative)
    else:
        assert args.run is not None
        summary = _export_run(args, RunDir(args.run))
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


def _export_run(args: Export, run: RunDir) -> "ExportSummary":
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


def _export_derivative(args: Export, derivative: Path) -> "ExportSummary":
    base, ticket, out = (_needed(args, name) for name in ("base", "ticket", "out"))
    from pmp_ds.derivative.derivative import loss_on, write_dithered
    from pmp_ds.release.export import export, require_absent
    from pmp_ds.release.ledger import Claim, lineage_of, read
    from pmp_ds.release.model_card import DerivativeFacts
    from pmp_ds.release.source import open_source
    from pmp_ds.state import theta0

    require_absent(out)
    run = RunDir(ticket.resolve().parent.parent)
    if run.ticket != ticket.resolve() or not theta0.is_known(run):
        raise UserError(
            f"--ticket {ticket} is not the ticket of a run, runs/NAME/private/ticket: "
            "derivatives are released by the run's owner; dithered with a recipient's copy, a "
            "model would no longer show whose it is"
        )
    ledger = run.ledger
    source = open_source(base)
    lineage = lineage_of(read(ledger), source.digest())
    source.close()
    title = re.search(r"^# (.+)$", read_text(base / "README.md"), re.MULTILINE)
    name = shown(title[1]) if title else base.resolve().name
    tokenizer = derivative if list(derivative.glob("tokenizer.*")) else base
    with tempfile.TemporaryDirectory(dir=ticket, prefix=".dither-") as scratch:
        weights = Path(scratch) / "weights"
        write_dithered(derivative, base, ticket, weights)
        if args.store is None:
            print("what the dither costs in loss was not measured: name a --store")
        else:
            before, after = (
                loss_on(folder, args.store, args.blocks) for folder in (derivative, weights)
            )
            print(
                f"dither: {before:.4f} -> {after:.4f} nats per token ({after - before:+.4f}) on "
                f"{args.blocks} validation blocks of {args.store}"
            )
        today = _today()
        card = DerivativeFacts(name=out.name, base=name, date=today, **_metadata(args))
        claim = Claim(
            path=ledger,
            lineage=lineage,
            kind="derivative",
            updates=None,
            date=today,
            reason=args.another_revision,
        )
        return export(weights, out, tokenizer_dir=tokenizer, card=card, claim=claim, **_form(args))


def _needed(args: Export, name: str) -> Path:
    path: Path | None = getattr(args, name)
    if path is None:
        raise UserError(f"--derivative needs --{name}")
    return path


def _metadata(args: Export) -> dict[str, Any]:
    return {
        "license": args.license,
        "languages": args.language,
        "datasets": args.dataset,
    }


def _form(args: Export) -> dict[str, Any]:
    return {
        "dtype": args.dtype,
        "max_shard_size": args.max_shard_size,
        "signing_key": args.sign,
    }


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _check_run(args: Export, run: RunDir) -> None:
    if not run.private.is_dir():
        raise UserError(f"--run {args.run} is not a run: {run.private} does not exist")
    make_private(run.private)
    if args.checkpoint == "init" or args.private:
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
