"""Runs the steps of a study; finished ones are not run again."""

import itertools
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from pmp_ds import signals
from pmp_ds.errors import EXIT_REQUEUE, Stopped, UserError
from pmp_ds.lease import hold
from pmp_ds.progress import Progress
from pmp_ds.run_dir import write_json
from pmp_ds.study.plan import Step, report_argv
from pmp_ds.study.recipe import Study

EXIT_LEAK = 1
"""Of `audit`, which has written its findings nevertheless."""


class _Children:
    """The commands that run now, and whether somebody asked to stop."""

    def __init__(self) -> None:
        self._asked: str | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def call(self, command: Sequence[str], output: IO[str] | None) -> int:
        """Run a command to its end and return its exit code."""
        with self._lock:
            self._raise_if_asked()
            process = subprocess.Popen(command, stdout=output, stderr=output)
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.remove(process)
        if code != 0:
            self._raise_if_asked()
        return code

    def _raise_if_asked(self) -> None:
        if self._asked is not None:
            raise Stopped(f"{self._asked}: {_GOES_ON}")

    def stop(self, number: signal.Signals) -> None:
        """Pass a signal on to all of them; none begins any more."""
        self._asked = number.name
        with self._lock:
            for process in self._running:
                process.send_signal(number)


_GOES_ON = "the same command resumes; finished steps are skipped"


def run(study: Study, planned: Sequence[Step], launch: str, jobs: int = 1) -> None:
    """Run what is not done, in order, then the report; ``launch`` starts the steps that train.

    With more than one of ``jobs``, steps that do not need each other run so many at a time, each
    with its output in ROOT/logs/. Raises UserError with the command that failed, and Stopped when
    it or one of them was asked to stop; signals are passed on.
    """
    root, children = Path(study.root), _Children()
    with hold(root, f"the study {root}"), signals.reacting(children.stop):
        todo = [step for step in planned if not step.is_done(root)]
        for apart, group in itertools.groupby(todo, lambda step: step.independent and jobs > 1):
            if apart:
                _run_side_by_side(list(group), root, launch, jobs, children)
            else:
                for step in group:
                    _run_step(step, root, launch, children)
        _call([sys.executable, *report_argv(study)], children)


def _run_side_by_side(
    group: Sequence[Step], root: Path, launch: str, jobs: int, children: _Children
) -> None:
    """After a failure no step begins; those that run may finish."""
    (root / "logs").mkdir(parents=True, exist_ok=True)
    failed = threading.Event()

    def one(step: Step) -> None:
        if failed.is_set():
            return
        try:
            _run_step(step, root, launch, children, root / "logs" / f"{step.name}.log")
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


def _run_step(
    step: Step, root: Path, launch: str, children: _Children, log: Path | None = None
) -> None:
    started = time.time()
    command = _on_ranks(launch, step.argv) if step.ranks else [sys.executable, *step.argv]
    accepted = (0, EXIT_LEAK) if step.may_leak else (0,)
    _call(command, children, accepted, log)
    if not step.output.exists() or (step.may_leak and step.output.stat().st_mtime < started - 1):
        raise UserError(f"{step.output} is missing after: {shlex.join(command)}")
    where = step.marker(root)
    where.parent.mkdir(parents=True, exist_ok=True)
    write_json(where, {"argv": list(step.argv), "seconds": round(time.time() - started, 1)})


def _on_ranks(launch: str, argv: Sequence[str]) -> list[str]:
    """The words of `A=1 deepspeed --num_accelerators 2` before those of a step. Settings of the
    environment go to env; `-m` is what Python and torchrun call a module."""
    words, rest = shlex.split(launch) or [sys.executable], list(argv)
    if rest[0] == "-m" and "pmp_ds.launch" in words:
        rest[:2] = [rest[1].rpartition(".")[2]]
    elif rest[0] == "-m" and any(Path(word).name == "deepspeed" for word in words):
        rest[0] = "--module"
    return ["env", *words, *rest] if "=" in words[0] else [*words, *rest]


def _call(
    command: Sequence[str],
    children: _Children,
    accepted: Sequence[int] = (0,),
    log: Path | None = None,
) -> None:
    if log is None:
        print(f"$ {shlex.join(command)}", flush=True)
        code = children.call(command, None)
    else:
        with open(log, "w", encoding="utf-8") as file:
            print(f"$ {shlex.join(command)}", file=file, flush=True)
            code = children.call(command, file)
    if code in accepted:
        return
    if code == EXIT_REQUEUE:
        raise Stopped(_GOES_ON)
    see = "" if log is None else f"\n  what it said: {log}"
    raise UserError(
        f"exit code {code} of: {shlex.join(command)}{see}\n  mend it and repeat the same command: "
        "finished steps are skipped"
    )
