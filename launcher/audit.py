"""`pmp-ds audit` from a checkout: `python launcher/audit.py --help`."""

from pmp_ds.commands.audit import command

if __name__ == "__main__":
    raise SystemExit(command())
