"""`pmp-ds prepare-data` from a checkout: `python launcher/prepare_data.py --help`."""

from pmp_ds.commands.prepare_data import command

if __name__ == "__main__":
    raise SystemExit(command())
