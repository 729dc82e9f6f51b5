"""`pmp-ds backup` from a checkout: `python launcher/backup.py --help`."""

from pmp_ds.commands.backup import command

if __name__ == "__main__":
    raise SystemExit(command())
