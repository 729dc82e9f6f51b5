"""Write what `pmp-ds backup` sealed into a run's folder: an empty one, or that run's own.

    pmp-ds restore demo.backup.age --identity backup-key.txt --run runs/demo

Files that the run lacks are written, 0600 below private/, and read back. Where the folder has
another content, everything is refused and nothing is written. Then, if its checkpoints are there,
the run resumes and exports as before; without them, `pmp-ds pretrain --config
runs/demo/config.yaml` repeats it from its initial weights and ticket. docs/VAULT.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmp_ds.cli import option, parse_options
from pmp_ds.commands.vault_options import Passphrase
from pmp_ds.errors import exit_code, quoted, require
from pmp_ds.run_dir import RunDir, loose


@dataclass(frozen=True, kw_only=True)
class Restore(Passphrase):
    """Which backup, what opens it, and where to."""

    file: Path = option("FILE", positional=True)
    """A file that `pmp-ds backup` wrote."""

    identity: Path | None = option("KEY", None)
    """The secret key that opens it: age's or ssh's."""

    run: Path = option("RUN")
    """A run's folder, runs/NAME: a new one, or that of the same run."""

    def __post_init__(self) -> None:
        require(
            (self.identity is not None) != self.by_passphrase,
            f"what opens {self.file}? Give --identity KEY, or a passphrase, and not both",
        )


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_options(Restore, argv, prog="pmp-ds restore", description=__doc__)
    from pmp_ds import lease
    from pmp_ds.foreign import read_bytes
    from pmp_ds.operate.backup_file import MOST_BYTES, in_words, read_archive
    from pmp_ds.operate.restore import missing, write
    from pmp_ds.ticket import keys

    sealed = read_bytes(args.file, MOST_BYTES)
    opener: Any
    if args.identity is not None:
        for line in loose(args.identity):
            print(f"warning: {line}", file=sys.stderr)
        opener = keys.identities(args.identity)
    else:
        opener = keys.read_passphrase(args.passphrase_file, confirm=False)
    backup = read_archive(keys.decrypt(sealed, opener, args.file), args.file)
    run = RunDir(args.run)
    with lease.hold(run.root, f"the run's folder {run.root}"):
        names = missing(backup, run)
        write(backup, run, names)
    print(f"{args.run}: {len(names)} of {len(backup.files)} files written, the others were there")
    print(f"  the backup of {backup.run} of {backup.date} has {in_words(backup.files)}")
    print(
        f"  what left after {backup.date} is not in its ledger: do not release this run again if "
        "something did"
    )
    print(f"  to resume or repeat it: pmp-ds pretrain --config {quoted(run.config)} ...")


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds restore` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
