"""Sum up a finished run: data, ticket, losses, release, and a generated sample.

    python launcher/report.py --run runs/demo

Everything is counted again from the files. Prints nothing that depends on which elements are in
the ticket.
"""

import argparse
from pathlib import Path

from pmp_ds.errors import exit_code
from pmp_ds.run_dir import RunDir

PROMPT = "def "


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="runs/NAME")
    parser.add_argument(
        "--prompt", default=PROMPT, metavar="TEXT", help="what the release continues"
    )
    arguments = parser.parse_args()

    from pmp_ds.summary import summarize  # imports transformers: seconds

    print(summarize(RunDir(arguments.run), arguments.prompt))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
