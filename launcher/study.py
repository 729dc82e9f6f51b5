"""Run a whole study: pretrain its arms, fine-tune, measure, audit, and report.

Run `python launcher/study.py --help`.
"""

import sys

from pmp_ds.cli import parse
from pmp_ds.errors import exit_code, require
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
        --launch 'DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_accelerators 2'
  then one process per fine-tuning, two at a time, which suits small models better
    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python launcher/study.py \\
        --config launcher/recipes/study-small.yaml --launch python --jobs 2"""


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
            "--jobs": {
                "type": int,
                "default": 1,
                "metavar": "N",
                "help": "fine-tunings and measurements at a time; their output goes to ROOT/logs/",
            },
        },
    )
    require(options["jobs"] > 0, f"--jobs {options['jobs']} must be positive")
    from pmp_ds.study import driver, plan

    planned = plan.steps(study)
    print(plan.describe(study, planned), flush=True)
    plan.rehearse_arms(study, planned)
    if not options["plan"]:
        driver.run(study, planned, options["launch"], options["jobs"])


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
