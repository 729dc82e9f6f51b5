"""`pmp-ds doctor` from a checkout: `python launcher/doctor.py --help`."""

from pmp_ds.commands.doctor import command

if __name__ == "__main__":
    raise SystemExit(command())
