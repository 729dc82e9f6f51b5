"""The two things that `pmp-ds export` can turn into a folder: a run, and a fine-tuned model."""

import contextlib
import datetime
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmp_ds.errors import UserError, shown
from pmp_ds.foreign import read_text
from pmp_ds.run_dir import RunDir, make_private
from pmp_ds.state.run_record import export_facts, load_config, read_data

if TYPE_CHECKING:
    from pmp_ds.commands.export import Export
    from pmp_ds.release.export import ExportSummary


def export_run(args: "Export", run: RunDir) -> "ExportSummary":
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

    given = config.init.weights is not None or theta0.is_given(run)
    if given and config.mask.source != "none" and not (args.base_is_private or private):
        raise UserError(
            f"{args.run} started from given weights (init.weights): whoever has them computes the "
            "mask as the difference from the release. If they never left you, pass "
            "--base-is-private; if anyone else has them, no release hides the mask, so keep the "
            "model (--private --out DIR) or train from a secret key (init.weights unset)"
        )
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


def export_derivative(args: "Export", derivative: Path) -> "ExportSummary":
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


def _needed(args: "Export", name: str) -> Path:
    path: Path | None = getattr(args, name)
    if path is None:
        raise UserError(f"--derivative needs --{name}")
    return path


def _metadata(args: "Export") -> dict[str, Any]:
    return {
        "license": args.license,
        "languages": args.language,
        "datasets": args.dataset,
    }


def _form(args: "Export") -> dict[str, Any]:
    return {
        "dtype": args.dtype,
        "max_shard_size": args.max_shard_size,
        "signing_key": args.sign,
    }


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _check_run(args: "Export", run: RunDir) -> None:
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
