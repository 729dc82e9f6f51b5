"""Seal what a run cannot be repeated or released without, as one file for its owner.

    pmp-ds vault keygen --out backup-key.txt > backup.pub     once; keep the key elsewhere
    pmp-ds backup runs/demo --to backup.pub --out demo.backup.age
    pmp-ds restore demo.backup.age --identity backup-key.txt --run runs/demo

In it: key and digest of the initial weights, ticket, ledger, registry of sealed copies,
config.yaml, data.json, tokenizer. Not in it: checkpoints, releases, metrics, the data. Everything
is checked first; unsealed content stays in memory. May run while the run trains. docs/VAULT.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmp_ds.cli import option, parse_options
from pmp_ds.commands.vault_options import Passphrase
from pmp_ds.errors import UserError, exit_code, require
from pmp_ds.run_dir import RunDir, write_bytes
from pmp_ds.settings import expanded


@dataclass(frozen=True, kw_only=True)
class BackUp(Passphrase):
    """Which run, for whom, and where to."""

    run: Path = option("RUN", positional=True)
    """A run's folder, runs/NAME."""

    to: tuple[str, ...] = option("KEY", ())
    """Public keys, or files with one on each line; any of them opens the file."""

    out: Path = option("FILE")
    """A new file, readable by you alone."""

    def __post_init__(self) -> None:
        require(
            bool(self.to) != self.by_passphrase,
            "give --to KEY, or a passphrase, and not both: age allows either",
        )

    def check(self) -> None:
        """Refuse a run that is not there, or a file that would be lost or leave."""
        require(self.run.is_dir(), f"{self.run} is not a run's folder: name runs/NAME")
        require(not self.out.exists(), f"--out {self.out} already exists: name a new file")
        require(
            self.out.absolute().parent.is_dir(),
            f"--out {self.out}: the folder {self.out.parent} does not exist",
        )
        release = RunDir(self.run).release.resolve()
        require(
            release not in self.out.resolve().parents,
            f"--out {self.out} is inside {release}, which leaves: name another folder",
        )


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_options(BackUp, argv, prog="pmp-ds backup", description=__doc__)
    args.check()
    from pmp_ds.operate.backup_file import archived, in_words
    from pmp_ds.ticket import keys

    to = keys.public_keys([expanded(key, "--to") for key in args.to]) if args.to else []
    phrase = keys.read_passphrase(args.passphrase_file, confirm=True) if not to else None
    from pmp_ds.operate.backup import gathered  # imports torch

    files = gathered(RunDir(args.run))
    sealed = keys.encrypt(archived(args.run.resolve().name, files), phrase or to)
    try:
        write_bytes(args.out, sealed, private=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from None
    opens = ", ".join(key.label for key in to) or "a passphrase"
    print(f"{args.out}: {len(sealed):,} bytes, sealed for {opens}")
    print(f"  in it: {in_words(files)}")
    print("  not in it: checkpoints, releases, metrics, the data")


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds backup` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
