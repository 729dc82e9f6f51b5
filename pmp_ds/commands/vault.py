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

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pmp_ds.cli import PlainParser
from pmp_ds.commands import trace
from pmp_ds.errors import UserError, exit_code, shown
from pmp_ds.run_dir import RunDir, write_bytes
from pmp_ds.settings import expanded
from pmp_ds.ticket import keys, vault


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = PlainParser("pmp-ds vault", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> Any:
        return commands.add_parser(name, help=text, description=text).add_argument

    add = command("keygen", "make a secret key; its public key is printed")
    add("--out", type=Path, required=True, metavar="FILE", help="a new file, readable by you alone")

    add = command("seal", "seal a run's ticket for one recipient, with a watermark")
    add("--run", type=Path, required=True, metavar="FOLDER", help="a run's folder, runs/NAME")
    add("--name", required=True, help="the recipient, as trace will name them")
    add(
        "--to",
        nargs="+",
        default=[],
        metavar="KEY",
        help="public keys, or files with one on each line; any of them opens the file",
    )
    add("--out", type=Path, required=True, metavar="FILE", help="a new file")
    add("--no-watermark", action="store_true", help="a copy that cannot be traced, for yourself")
    _passphrase(add)

    add = command("open", "write the ticket in a sealed file as a folder")
    add("file", type=Path, metavar="FILE")
    add("--identity", type=Path, metavar="KEY", help="your secret key: age's or ssh's")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder, yours alone")
    _passphrase(add)

    add = command("verify", "does a ticket fit a model, and does it come from a run?")
    add("file", type=Path, metavar="FILE|FOLDER", help="a sealed file, or a ticket's folder")
    add("--identity", type=Path, metavar="KEY", help="what opens the sealed file")
    add("--model", type=Path, metavar="FOLDER", help="a release: names and shapes must be equal")
    add("--run", type=Path, metavar="FOLDER", help="the owner's run it should come from")
    _passphrase(add)

    add = command("show", "what a ticket keeps of each kind of parameter: as secret as itself")
    add("file", type=Path, metavar="FILE|FOLDER", help="a sealed file, or a ticket's folder")
    add("--identity", type=Path, metavar="KEY", help="what opens the sealed file")
    _passphrase(add)

    add = command("list", "the copies of a run's ticket that were sealed")
    add("--run", type=Path, required=True, metavar="FOLDER")

    add = command("trace", "name the recipient whose copy leaked, or nobody")
    add("--run", type=Path, required=True, metavar="FOLDER")
    add("--ticket", type=Path, metavar="FOLDER", help="the leaked ticket")
    add("--model", type=Path, metavar="FOLDER", help="a model that was fine-tuned with it")
    add(
        "--base",
        type=Path,
        metavar="FOLDER",
        help="what --model was fine-tuned from. Default: the run's release",
    )
    return parser.parse_args(argv)


def _passphrase(add: Any) -> None:
    add("--passphrase", action="store_true", help="ask for a passphrase; it stands for a key")
    add(
        "--passphrase-file",
        type=Path,
        metavar="FILE",
        help="read it from a file's first line; /dev/fd/N reads a descriptor",
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if getattr(args, "run", None) is not None and not RunDir(args.run).private.is_dir():
        raise UserError(f"--run {args.run} is not a run: it has no private folder")
    verbs = {
        "keygen": keygen,
        "seal": seal,
        "open": open_,
        "verify": verify,
        "show": show,
        "list": list_,
        "trace": trace_,
    }
    try:
        verbs[args.command](args)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None


def keygen(args: argparse.Namespace) -> None:
    print(keys.new_identity(args.out))


def seal(args: argparse.Namespace) -> None:
    run, name = RunDir(args.run), vault.recipient(args.name)
    _require_absent(args.out)
    by_passphrase = args.passphrase or args.passphrase_file is not None
    if bool(args.to) == by_passphrase:
        raise UserError("give --to KEY, or a passphrase, and not both: age allows either")
    _warn(run.ticket, run.vault, run.init)
    known = vault.records(run.vault)
    to = [] if by_passphrase else keys.public_keys([expanded(key, "--to") for key in args.to])
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
    phrase = keys.read_passphrase(args.passphrase_file, confirm=True) if by_passphrase else None
    sealed = vault.seal(ticket, phrase or to)
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    vault.remember(  # before the file exists: no copy without its line
        run.vault,
        vault.Record(name=name, keys=labels, date=date, watermark=number, file=str(args.out)),
    )
    write_bytes(args.out, sealed, private=True)
    marked = "without a watermark" if number is None else f"watermark {number}"
    print(f"{args.out}: sealed for {name} ({', '.join(labels) or 'a passphrase'}), {marked}")
    if strength:
        print(strength)


def open_(args: argparse.Namespace) -> None:
    from pmp_ds.ticket.ticket import save_ticket

    _require_absent(args.out)
    opener = _opener(args)
    if opener is None:
        raise UserError(f"what opens {args.file}? Give --identity KEY or --passphrase")
    ticket = vault.open_sealed(args.file, opener)
    save_ticket(ticket, args.out)
    print(f"{args.out}: a ticket for a model of {ticket.mask.num_params:,} parameters")
    print("keep it private: whoever has it can fine-tune the model, and it names you")


def verify(args: argparse.Namespace) -> None:
    from pmp_ds.ticket.trace import fitted_to
    from pmp_ds.ticket.watermark import missing_from

    if args.model is None and args.run is None:
        raise UserError("verify against what? Give --model FOLDER, --run FOLDER, or both")
    ticket = vault.any_ticket(args.file, _opener(args))
    if args.file.is_dir():
        _warn(args.file)
    if args.model is not None:
        fitted_to(ticket.mask, args.model)
        print(f"fits {args.model}: {len(ticket.mask.shapes)} parameters, same names and shapes")
    if args.run is not None:
        own = vault.any_ticket(RunDir(args.run).ticket, None)
        dropped = missing_from(ticket, own, args.file)
        print(f"comes from {args.run}: its ticket" + (" less a watermark" if dropped else ""))


def show(args: argparse.Namespace) -> None:
    from pmp_ds.ticket import densities

    mask = vault.any_ticket(args.file, _opener(args)).mask
    print(densities.describe(mask))
    if frozen := densities.frozen(mask):
        print(
            f"warning: whole parameters never train: {', '.join(frozen)}. A model pays for that, "
            "most where they are queries and keys; mask.quota: per_tensor gives every parameter "
            "its share (docs/METHOD.md)"
        )


def list_(args: argparse.Namespace) -> None:
    run = RunDir(args.run)
    _warn(run.vault)
    found = vault.records(run.vault)
    for record in found:
        opens = ", ".join(record.keys) or "a passphrase"
        print(f"{record.date}  {record.watermark or 'unmarked':16}  {shown(record.name)}  {opens}")
    print(f"{len(found)} copies sealed")


def trace_(args: argparse.Namespace) -> None:
    trace.trace(RunDir(args.run), args.ticket, args.model, args.base)


def _opener(args: argparse.Namespace) -> Any:
    """Identities, a passphrase, or None."""
    by_passphrase = args.passphrase or args.passphrase_file is not None
    if by_passphrase and args.identity is not None:
        raise UserError("--identity and a passphrase are two ways to open a file: give one")
    if by_passphrase:
        return keys.read_passphrase(args.passphrase_file, confirm=False)
    if args.identity is None:
        return None
    _warn(args.identity)
    return keys.identities(args.identity)


def _warn(*paths: Path) -> None:
    for line in vault.loose(*paths):
        print(f"warning: {line}", file=sys.stderr)


def _require_absent(out: Path) -> None:
    if out.exists():
        raise UserError(f"--out {out} exists already: name a new one")
    if not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds vault` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
