"""`pmp-ds evaluate` from a checkout: `python launcher/evaluate.py --help`."""

import sys
from pathlib import Path

from pmp_ds.commands.evaluate import command

if __name__ == "__main__":
    # lm-eval imports a package that is also called `evaluate`: take this folder off the path.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    raise SystemExit(command())
