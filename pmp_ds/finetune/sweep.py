"""Run a grid of fine-tunings in one process: every cell once, without repeating finished ones."""

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from transformers import logging

from pmp_ds import dist, results, verbosity
from pmp_ds.engine.cut import Cut
from pmp_ds.errors import UserError
from pmp_ds.finetune.cell import forget, settings_of, tune
from pmp_ds.finetune.config import FinetuneConfig
from pmp_ds.finetune.method import METHODS
from pmp_ds.finetune.methods import load_model, open_ticket
from pmp_ds.finetune.tasks import Task, open_task
from pmp_ds.progress import Progress
from pmp_ds.results import Result, model_digest
from pmp_ds.run_dir import RunDir
from pmp_ds.watch.held import held
from pmp_ds.watch.watch import watching

Grid = Mapping[str, Sequence[str]]
WHOLE = ""
"""Name of the only cell of an empty grid."""


def grid(sweeps: Sequence[str]) -> dict[str, list[str]]:
    """Return values by setting, from `SETTING=A,B` or several at once, `lr=A,B,seed=0,1`. The last
    part of a setting's name suffices if it is unique. Raises UserError."""
    found: dict[str, list[str]] = {}
    for text in (part for given in sweeps for part in re.split(r"[;,](?=\s*[\w.]+=)", given)):
        name, equals, values = text.strip().partition("=")
        name, names = _full_name(name), [value.strip() for value in values.split(",")]
        if not equals or not name or "" in names:
            raise UserError(f"--sweep {text!r}: write SETTING=A,B as in train.lr=1e-5,1e-4")
        if name.split(".")[0] in ("run", "guard", "results", "arm"):
            raise UserError(f"--sweep {name}: it does not affect training")
        if name in found or len(set(names)) != len(names):
            raise UserError(f"--sweep {text!r} names a setting or a value twice")
        found[name] = names
    return found


def _full_name(name: str) -> str:
    """Return `train.lr` for `lr`; unknown or ambiguous last parts stay as they are."""
    hints = get_type_hints(FinetuneConfig)
    inner = [f"{s}.{f.name}" for s in hints if is_dataclass(hints[s]) for f in fields(hints[s])]
    ending = [known for known in inner if known.partition(".")[2] == name]
    return ending[0] if len(ending) == 1 and name not in hints else name


def cells(grid: Grid) -> dict[str, list[str]]:
    """Return the flags of every cell by name, `lr=1e-5,seed=0`; the last setting varies fastest.
    Raises UserError when two cells would have the same name: it is that of a cell's folder, without
    slashes."""
    found: dict[str, list[str]] = {}
    titles: dict[str, str] = {}
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        short = (f"{name.rpartition('.')[2]}={value}" for name, value in chosen.items())
        title = ",".join(short)
        name = title.replace("/", "_")
        if name in found:
            raise UserError(
                f"--sweep: {titles[name]} and {title} would both be the cell {name}; rename one of "
                "the paths, or sweep over each under its own run.name"
            )
        titles[name] = title
        found[name] = [word for key, value in chosen.items() for word in (f"--{key}", value)]
    return found


def run_all(
    cells: Mapping[str, FinetuneConfig],
    ds_config: dict[str, Any],
    run: RunDir,
    where: Path,
    started: float,
    *,
    keep_models: bool,
    start_afresh: bool = False,
) -> list[Result]:
    """Run the cells that are not in the results at ``where``, and append each result. Collective.
    Mistakes in any cell are found before the first begins."""
    with held(run.root, f"the run's folder {run.root}"):
        return _run_all(cells, ds_config, run, where, started, keep_models, start_afresh)


def _run_all(
    cells: Mapping[str, FinetuneConfig],
    ds_config: dict[str, Any],
    run: RunDir,
    where: Path,
    started: float,
    keep_models: bool,
    start_afresh: bool,
) -> list[Result]:
    logging.set_verbosity_error()  # the heads are meant to be new
    logging.disable_progress_bar()
    tasks = _Tasks()
    digests: dict[str, str] = {}
    tickets = dist.together(lambda: _check_all(cells, tasks))
    for config in cells.values():
        if config.model not in digests:
            digests[config.model] = dist.on_rank0(partial(model_digest, Path(config.model)))
    finished = dist.on_rank0(lambda: {result.key: result for result in results.read(where)})
    done = {}
    for name, config in cells.items():
        settings = settings_of(config, tasks.of(config), tickets[name])
        found = results.find(finished, "finetune", digests[config.model], settings)
        if found is not None:
            done[name] = found
    first = next(iter(cells.values()))
    if dist.rank() == 0:
        run.root.mkdir(parents=True, exist_ok=True)
        if verbosity.informs():
            print(_plan(cells, done, where), flush=True)
    dist.barrier()
    with (
        watching(run, first.run.max_seconds, first.guard.hang_seconds, started) as watch,
        _overall(len(cells), len(done)) as bar,
    ):
        failed: dict[str, str] = {}
        for name, config in cells.items():
            if name in done:
                continue
            folder = RunDir(run.root / "cells" / name) if name != WHOLE else run
            try:
                done[name] = tune(
                    config,
                    ds_config,
                    tasks.of(config),
                    folder,
                    watch,
                    digest=digests[config.model],
                    keep_model=keep_models,
                    start_afresh=start_afresh,
                )
            except UserError as error:  # from the guard, on every rank: other cells may succeed
                if len(cells) == 1:
                    raise
                failed[name] = str(error)
                if dist.rank() == 0:
                    print(f"{name}: {error}", flush=True)
            if dist.rank() == 0 and name in done:
                results.append(where, done[name])
                forget(folder)
                print(f"{name or config.method}: {_line(done[name])}", flush=True)
            if bar:
                bar.update(1)
    if dist.rank() == 0 and len(cells) > 1:
        print(f"{len(done)} of {len(cells)} cells are in {where}:\n{_table(done)}", flush=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(cells)} cells have no result: {', '.join(failed)}. The reasons "
            "are above; change their settings, or leave them out"
        )
    return [done[name] for name in cells]


def _check_all(cells: Mapping[str, FinetuneConfig], tasks: "_Tasks") -> dict[str, str | None]:
    """Raise UserError unless model and method fit together, and batch and ranks. Return the id of
    each cell's ticket, None without one."""
    tickets: dict[str, str | None] = {}
    for name, config in cells.items():
        task = tasks.of(config)
        _batch(config)
        ticket = open_ticket(config)
        tickets[name] = ticket.id if ticket else None
        if METHODS[config.method].adapts:
            load_model(config, task.num_labels)
    return tickets


class _Tasks:
    """A cache of tasks, each read and encoded once."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}

    def of(self, config: FinetuneConfig) -> Task:
        key = repr((config.model, config.task, config.data))
        if key not in self._tasks:
            self._tasks[key] = open_task(config)
        return self._tasks[key]


def _overall(cells: int, done: int) -> Any:
    """Return a bar over the cells of a sweep."""
    if cells == 1:
        return contextlib.nullcontext()
    return Progress("sweep", "cell", cells, initial=done)


def _plan(cells: Mapping[str, FinetuneConfig], done: Mapping[str, Result], where: Path) -> str:
    config = next(iter(cells.values()))
    new = config.task != "lm"
    rows = {
        "model": f"{config.model}{', fresh weights' if config.scratch else ''}",
        "task": ", ".join(sorted({c.task for c in cells.values()})),
        "method": ", ".join(sorted({c.method for c in cells.values()}))
        + (": a new head on the last token always trains, outside every mask" if new else ""),
        "batch": "; ".join(dict.fromkeys(map(_batch, cells.values()))),
        "cells": f"{len(cells)}, of which {len(done)} are finished",
        "results": str(where),
    }
    return "\n".join(f"  {name:<10}{text}" for name, text in rows.items())


def _batch(config: FinetuneConfig) -> str:
    ranks = dist.world_size()
    cut = Cut.of(config.train.complete(config.train.global_batch_size, ranks), ranks)
    return cut.in_words() + cut.unused


def _line(result: Result) -> str:
    """Return a line such as `SST-2 accuracy 0.812 (majority 0.509)`."""
    parts = []
    for column, metric in result.values["primary"].items():
        value = result.values["metrics"][column][metric]
        baseline = result.values["majority"].get(column)
        beside = f" (majority {baseline[metric]:.3f})" if baseline else ""
        parts.append(f"{column} {metric} {value:.3f}{beside}")
    return ", ".join(parts)


def _table(done: Mapping[str, Result]) -> str:
    width = max(map(len, done), default=0)
    return "\n".join(f"  {name:<{width}}  {_line(result)}" for name, result in done.items())
