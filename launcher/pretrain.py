"""`pmp-ds pretrain` from a checkout: `python launcher/pretrain.py --help`."""

from pmp_ds.commands.pretrain import command

if __name__ == "__main__":
    raise SystemExit(command())
