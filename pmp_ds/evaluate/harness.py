"""A bridge to the lm-eval harness, whose code measures the loaded model on any of its tasks."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pmp_ds.errors import UserError
from pmp_ds.evaluate.subject import Subject

PACKAGE = "lm_eval"


def installed() -> str:
    """Return the harness's version. Raises UserError when it is not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        raise UserError(
            "lm_eval measures with the lm-eval harness, which is not installed: "
            "pip install 'pmp_ds[eval]'"
        ) from None


def task_manager(tasks: Sequence[str], task_dir: Path | None) -> Any:
    """Return the harness's task manager. Raises UserError for a task that it does not know."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_dir) if task_dir else None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(
            f"--tasks: lm-eval {installed()} has no task {unknown[0]!r}; `lm-eval ls tasks` lists "
            "them, --task_dir FOLDER adds your own"
        )
    return manager


def run_task(
    subject: Subject, task: str, manager: Any, limit: int | None, batch_size: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return `metrics` by task, or by part of a task group, with the harness's names (`acc,none`).
    Raises UserError when the data cannot be read."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size)
    try:
        found: Any = simple_evaluate(
            model=model, tasks=[task], task_manager=manager, limit=limit, log_samples=False
        )
    except (OSError, ConnectionError) as error:  # its data sets come from the network
        raise UserError(f"--tasks {task}: the data cannot be read: {error}") from error
    return {"metrics": {name: _numbers(values) for name, values in found["results"].items()}}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
