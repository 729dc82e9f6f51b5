"""Sum up a finished run: data, ticket, losses, release, and a generated sample.

    python launcher/report.py --run runs/demo

Everything is counted again from the files. Prints nothing that depends on which elements are in
the ticket.
"""

from pathlib import Path

from pmp_ds.cli import PlainParser
from pmp_ds.errors import exit_code
from pmp_ds.run_dir import RunDir
from pmp_ds.train.run_facts import load_config

PROMPT = "def "


def main() -> None:
    parser = PlainParser("report.py", __doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="runs/NAME")
    parser.add_argument(
        "--prompt", default=PROMPT, metavar="TEXT", help="what the release continues"
    )
    arguments = parser.parse_args()
    run = RunDir(arguments.run)
    load_config(run)  # UserError at once when it is no run

    from pmp_ds.summary import summarize  # imports transformers: seconds

    print(summarize(run, arguments.prompt))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
