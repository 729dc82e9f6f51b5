"""`pmp-ds vault` from a checkout: `python launcher/vault.py --help`."""

from pmp_ds.commands.vault import command

if __name__ == "__main__":
    raise SystemExit(command())
