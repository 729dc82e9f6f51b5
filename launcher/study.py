"""`pmp-ds study` from a checkout: `python launcher/study.py --help`."""

from pmp_ds.commands.study import command

if __name__ == "__main__":
    raise SystemExit(command())
