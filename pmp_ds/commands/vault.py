"""Hand tickets to partners: sealed for their keys, marked, and traced when one leaks.

    pmp-ds vault keygen --out key.txt > partner.pub             # the partner
    pmp-ds vault seal --run runs/x --name "Partner A" --to partner.pub --out a.age
    pmp-ds vault open a.age --identity key.txt --out ticket     # the partner
    pmp-ds vault verify ticket --model release
    pmp-ds vault show runs/x/private/ticket
    pmp-ds vault list --run runs/x
    pmp-ds vault trace --run runs/x --ticket LEAKED
    pmp-ds vault trace --run runs/x --model FINE_TUNED --base runs/x/release

Keys are those of the `age` command, or ssh-ed25519 and ssh-rsa keys. docs/VAULT.md has the rest.
"""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pmp_ds.cli import Verbs, run_verb
from pmp_ds.commands import trace
from pmp_ds.commands.vault_options import (
    AnyTicket,
    Keygen,
    List,
    Open,
    Seal,
    Show,
    Trace,
    Verify,
)
from pmp_ds.errors import UserError, exit_code, require, shown
from pmp_ds.run_dir import RunDir, loose, write_bytes
from pmp_ds.settings import expanded
from pmp_ds.ticket import keys, vault


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        run_verb(VERBS, argv, prog="pmp-ds vault", description=__doc__)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None


def keygen(args: Keygen) -> None:
    print(keys.new_identity(args.out))


def seal(args: Seal) -> None:
    run, name = _run(args.run), vault.recipient(args.name)
    _require_absent(args.out)
    _warn(run.ticket, run.vault, run.init)
    known = vault.records(run.vault)
    to = keys.public_keys([expanded(key, "--to") for key in args.to]) if args.to else []
    vault.check_recipient(known, name, to)
    ticket = vault.any_ticket(run.ticket, None)
    number, strength = None, ""
    if not args.no_watermark:
        from pmp_ds.ticket import watermark
        from pmp_ds.ticket.trace import resists

        secret = trace.secret_of(run, known, may_create=True)
        code = trace.code_of(ticket.mask, secret)
        key, number = trace.watermark_of(secret, name)
        ticket = watermark.without(ticket, code, watermark.codeword(code, key))
        recipients = len({record.watermark for record in known} - {None} | {number})
        strength = (
            f"a leak made from the copies of up to {resists(len(code), recipients)} recipients "
            "together still names one of them"
        )
    labels = tuple(key.label for key in to)
    phrase = None
    if args.by_passphrase:
        phrase = keys.read_passphrase(args.passphrase_file, confirm=True)
    sealed = vault.seal(ticket, phrase or to)
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    vault.remember(  # before the file exists: no copy without its line
        run.vault,
        vault.Record(name=name, keys=labels, date=date, watermark=number, file=str(args.out)),
    )
    with vault.writing(args.out):
        write_bytes(args.out, sealed, private=True)
    marked = "without a watermark" if number is None else f"watermark {number}"
    print(f"{args.out}: sealed for {name} ({', '.join(labels) or 'a passphrase'}), {marked}")
    if strength:
        print(strength)


def open_(args: Open) -> None:
    from pmp_ds.ticket.ticket import save_ticket

    _require_absent(args.out)
    opener = _opener(args)
    if opener is None:
        raise UserError(f"what opens {args.file}? Give --identity KEY or --passphrase")
    ticket = vault.open_sealed(args.file, opener)
    with vault.writing(args.out):
        save_ticket(ticket, args.out)
    print(f"{args.out}: a ticket for a model of {ticket.mask.num_params:,} parameters")
    print("keep it private: whoever has it can fine-tune the model, and it names you")


def verify(args: Verify) -> None:
    from pmp_ds.ticket.trace import fitted_to
    from pmp_ds.ticket.watermark import missing_from

    ticket = vault.any_ticket(args.file, _opener(args))
    if args.file.is_dir():
        _warn(args.file)
    if args.model is not None:
        fitted_to(ticket.mask, args.model)
        print(f"fits {args.model}: {len(ticket.mask.shapes)} parameters, same names and shapes")
    if args.run is not None:
        own = vault.any_ticket(_run(args.run).ticket, None)
        dropped = missing_from(ticket, own, args.file)
        print(f"comes from {args.run}: its ticket" + (" less a watermark" if dropped else ""))


def show(args: Show) -> None:
    from pmp_ds.ticket import densities

    mask = vault.any_ticket(args.file, _opener(args)).mask
    print(densities.describe(mask))
    if frozen := densities.frozen(mask):
        print(
            f"warning: whole parameters never train: {', '.join(frozen)}. A model pays for that, "
            "most where they are queries and keys; mask.quota: per_tensor gives every parameter "
            "its share (docs/METHOD.md)"
        )


def list_(args: List) -> None:
    run = _run(args.run)
    _warn(run.vault)
    found = vault.records(run.vault)
    for record in found:
        opens = ", ".join(record.keys) or "a passphrase"
        print(f"{record.date}  {record.watermark or 'unmarked':16}  {shown(record.name)}  {opens}")
    print(f"{len(found)} copies sealed")


def trace_(args: Trace) -> None:
    trace.trace(_run(args.run), args.ticket, args.model, args.base)


VERBS: Verbs = {
    "keygen": (Keygen, keygen),
    "seal": (Seal, seal),
    "open": (Open, open_),
    "verify": (Verify, verify),
    "show": (Show, show),
    "list": (List, list_),
    "trace": (Trace, trace_),
}


def _run(folder: Path) -> RunDir:
    run = RunDir(folder)
    require(run.private.is_dir(), f"--run {folder} is not a run: it has no private folder")
    return run


def _opener(args: AnyTicket) -> Any:
    """Return identities, a passphrase, or None."""
    if args.by_passphrase and args.identity is not None:
        raise UserError("--identity and a passphrase are two ways to open a file: give one")
    if args.by_passphrase:
        return keys.read_passphrase(args.passphrase_file, confirm=False)
    if args.identity is None:
        return None
    _warn(args.identity)
    return keys.identities(args.identity)


def _warn(*paths: Path) -> None:
    for line in loose(*paths):
        print(f"warning: {line}", file=sys.stderr)


def _require_absent(out: Path) -> None:
    if out.exists():
        raise UserError(f"--out {out} already exists: name a new one")
    if not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds vault` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
