"""Runs the steps of a study; finished ones are not run again."""

import itertools
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pmp_ds.errors import EXIT_REQUEUE, Stopped, UserError
from pmp_ds.progress import Progress
from pmp_ds.run_dir import write_json
from pmp_ds.study.plan import Step, report_argv
from pmp_ds.study.recipe import Study

EXIT_LEAK = 1
"""Of audit.py, which has written its findings nevertheless."""


def run(study: Study, planned: Sequence[Step], launch: str, jobs: int = 1) -> None:
    """Run what is not done, in order, then the report; ``launch`` starts the steps that train.

    With more than one of ``jobs``, steps that do not need each other run so many at a time, each
    with its output in ROOT/logs/. Raises UserError with the command that failed, and Stopped when
    one was asked to stop.
    """
    root = Path(study.root)
    todo = [step for step in planned if not step.is_done(root)]
    for apart, group in itertools.groupby(todo, lambda step: step.independent and jobs > 1):
        if apart:
            _run_side_by_side(list(group), root, launch, jobs)
        else:
            for step in group:
                _run_step(step, root, launch)
    _call([sys.executable, *report_argv(study)])


def _run_side_by_side(group: Sequence[Step], root: Path, launch: str, jobs: int) -> None:
    """After a failure no step begins; those that run may finish."""
    (root / "logs").mkdir(parents=True, exist_ok=True)
    failed = threading.Event()

    def one(step: Step) -> None:
        if failed.is_set():
            return
        try:
            _run_step(step, root, launch, root / "logs" / f"{step.name}.log")
        except BaseException:
            failed.set()
            raise
        bar.update(step.cells)

    with (
        Progress("measure", "cell", sum(step.cells for step in group)) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        futures = [pool.submit(one, step) for step in group]
    for future in futures:
        future.result()


def _run_step(step: Step, root: Path, launch: str, log: Path | None = None) -> None:
    started = time.time()
    command = [*_launcher(launch), *step.argv] if step.ranks else [sys.executable, *step.argv]
    accepted = (0, EXIT_LEAK) if step.may_leak else (0,)
    _call(command, accepted, log)
    if not step.output.exists() or (step.may_leak and step.output.stat().st_mtime < started - 1):
        raise UserError(f"{step.output} is missing after: {shlex.join(command)}")
    where = step.marker(root)
    where.parent.mkdir(parents=True, exist_ok=True)
    write_json(where, {"argv": list(step.argv), "seconds": round(time.time() - started, 1)})


def _launcher(launch: str) -> list[str]:
    """`A=1 deepspeed --num_accelerators 2` as words; settings of the environment go to env."""
    words = shlex.split(launch) or [sys.executable]
    return ["env", *words] if "=" in words[0] else words


def _call(command: Sequence[str], accepted: Sequence[int] = (0,), log: Path | None = None) -> None:
    if log is None:
        print(f"$ {shlex.join(command)}", flush=True)
        code = subprocess.run(command, check=False).returncode
    else:
        with open(log, "w", encoding="utf-8") as file:
            print(f"$ {shlex.join(command)}", file=file, flush=True)
            code = subprocess.run(command, check=False, stdout=file, stderr=file).returncode
    if code in accepted:
        return
    if code == EXIT_REQUEUE:
        raise Stopped("the same command goes on; finished steps are skipped")
    see = "" if log is None else f"\n  what it said: {log}"
    raise UserError(
        f"exit code {code} of: {shlex.join(command)}{see}\n  mend it and repeat the same command: "
        "finished steps are skipped"
    )
