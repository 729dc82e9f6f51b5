"""`pmp-ds export` from a checkout: `python launcher/export.py --help`."""

from pmp_ds.commands.export import command

if __name__ == "__main__":
    raise SystemExit(command())
