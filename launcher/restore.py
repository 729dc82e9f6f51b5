"""`pmp-ds restore` from a checkout: `python launcher/restore.py --help`."""

from pmp_ds.commands.restore import command

if __name__ == "__main__":
    raise SystemExit(command())
