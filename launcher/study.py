"""Run a whole study: pretrain its arms, fine-tune, measure, audit, and report.

Run `python launcher/study.py --help`.
"""

import sys

from pmp_ds.cli import parse
from pmp_ds.errors import exit_code
from pmp_ds.study.recipe import Study

DESCRIPTION = """\
Run a whole study: every command in order, the plan with its counts first. Finished steps are
skipped, so the same command goes on after a stop; what fails is named. Ends with
launcher/report.py."""

EPILOG = """\
examples:
  the plan alone
    python launcher/study.py --config launcher/recipes/study-small.yaml --plan
  two CPU ranks for the steps that train
    python launcher/study.py --config launcher/recipes/study-small.yaml \\
        --launch 'DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_accelerators 2'"""


def main() -> None:
    study, options = parse(
        Study,
        sys.argv[1:],
        prog="study.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        options={
            "--plan": {"action": "store_true", "help": "print the plan and stop"},
            "--launch": {
                "type": str,
                "default": "deepspeed",
                "metavar": "COMMAND",
                "help": "what starts pretrain.py and finetune.py; VARIABLE=VALUE may lead",
            },
        },
    )
    from pmp_ds.study import plan

    planned = plan.steps(study)
    print(plan.describe(study, planned), flush=True)
    if not options["plan"]:
        plan.run(study, planned, options["launch"])


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
