"""`pmp-ds report` from a checkout: `python launcher/report.py --help`."""

from pmp_ds.commands.report import command

if __name__ == "__main__":
    raise SystemExit(command())
