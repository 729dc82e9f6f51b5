"""Run a whole study: pretrain its arms, fine-tune, measure, audit, and report.

Run `pmp-ds study --help`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pmp_ds.cli import option, parse
from pmp_ds.errors import exit_code, require
from pmp_ds.settings import expanded
from pmp_ds.study.recipe import Study

DESCRIPTION = """\
Run a whole study: every command in order, the plan with its counts first. Finished steps are
skipped, so the same command goes on after a stop; what fails is named. Ends with
pmp-ds report."""

EPILOG = """\
examples:
  the plan alone
    pmp-ds study --config study-small --plan
  two CPU ranks for the steps that train
    pmp-ds study --config study-small \\
        --launch 'DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_accelerators 2'
  then one process per fine-tuning, two at a time, which suits small models better
    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 pmp-ds study \\
        --config study-small --launch python --jobs 2"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the steps are run."""

    plan: bool = False
    """Print the plan and stop."""

    launch: str = option("COMMAND", "deepspeed")
    """What starts `pretrain` and `finetune`; VARIABLE=VALUE may lead."""

    jobs: int = 1
    """Fine-tunings and measurements at a time; their output goes to ROOT/logs/."""

    def __post_init__(self) -> None:
        require(self.jobs > 0, f"--jobs {self.jobs} must be positive")


def main(argv: Sequence[str] | None = None) -> None:
    study, options = parse(
        Study,
        sys.argv[1:] if argv is None else argv,
        options=Options,
        prog="pmp-ds study",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    from pmp_ds.study import driver, plan

    planned = plan.steps(study)
    print(plan.describe(study, planned), flush=True)
    plan.rehearse_arms(study, planned)
    if not options.plan:
        driver.run(study, planned, expanded(options.launch, "--launch"), options.jobs)


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds study` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
