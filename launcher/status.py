"""`pmp-ds status` from a checkout: `python launcher/status.py --help`."""

from pmp_ds.commands.status import command

if __name__ == "__main__":
    raise SystemExit(command())
