"""`pmp-ds finetune` from a checkout: `python launcher/finetune.py --help`."""

from pmp_ds.commands.finetune import command

if __name__ == "__main__":
    raise SystemExit(command())
