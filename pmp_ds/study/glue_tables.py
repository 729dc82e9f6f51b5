"""The paper's Table 1 and its companions: what each arm scores at each stage."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from statistics import fmean

from pmp_ds.finetune.method import Method, Role, reported
from pmp_ds.results import Result
from pmp_ds.study.choice import Cell, Scores, best, by_method, cells, samples, with_average
from pmp_ds.study.runs import (
    AVERAGE,
    BASE,
    PMP,
    RANDOM,
    FineTune,
    by_task,
    digits,
    is_lm,
    ordered,
    pick,
)
from pmp_ds.study.statistics import Estimate, level
from pmp_ds.study.tables import Table

HEADS = {"untrained-head": "Untrained head", "zero-shot": "Zero-shot"}

Levels = Mapping[str, Estimate]
"""column -> mean with interval: fractions, nats per token for losses."""


def arms(names: Iterable[str]) -> list[str]:
    """Return ``names``, those with a role first."""
    order = {arm: i for i, arm in enumerate((BASE, PMP, RANDOM))}
    return sorted(set(names), key=lambda arm: (order.get(arm, len(order)), arm))


def levels(found: Scores) -> Levels:
    return {c: level([-v if is_lm(c) else v for v in u.values()]) for c, u in found.items()}


def tuned(
    runs: Iterable[FineTune],
    grids: Mapping[str, Collection[Cell]] | None = None,
    *,
    primary: bool = False,
) -> Levels:
    """Return the best cell of each task, among those of ``grids``."""
    found: Scores = {}
    for task, own in by_task(runs).items():
        chosen = best(own, grids and grids[task], primary=primary)
        found.update(samples(chosen, primary=primary))
    return levels(found if primary else with_average(found))  # metrics have no common scale


def fine_tuned(
    runs: Sequence[FineTune], arm: str, methods: Sequence[Method], *, primary: bool = False
) -> Levels:
    """Return the best cell of each task. Without the mask, every arm chooses among the cells that
    BASE and PMP both completed, so that none has more tries than another."""
    grids = None
    if all(method.role is Role.ATTACK for method in methods):
        grids = {task: _shared(own, methods) for task, own in by_task(runs).items()}
    return tuned(pick(runs, arm, methods), grids, primary=primary)


def _shared(runs: Sequence[FineTune], methods: Sequence[Method]) -> set[Cell]:
    return set.intersection(
        *(set(cells(pick(runs, arm, methods), by_method)) for arm in (BASE, PMP))
    )


def heads(results: Iterable[Result], arm: str, kind: str) -> Levels:
    """Return accuracies without any fine-tuning, over the seeds."""
    found: Scores = defaultdict(dict)
    for result in results:
        if result.kind == kind and result.arm == arm:
            unit = (result.model_digest, result.settings.get("seed", 0))
            for column, values in result.values["metrics"].items():
                found[column][unit] = values["accuracy"]
    return levels(with_average(found))


def majority(results: Iterable[Result]) -> dict[str, float]:
    """Return column -> accuracy of the most frequent label, and the average."""
    found = {
        column: values["accuracy"]
        for result in results
        for column, values in result.values.get("majority", {}).items()
        if "accuracy" in values
    }
    return found | ({AVERAGE: fmean(found.values())} if len(found) > 1 else {})


def cell(estimate: Estimate | None, column: str) -> str:
    """Return `83.1 ± 0.4` in percent, or nats; an asterisk stands for one seed."""
    if estimate is None:
        return "-"
    factor, places = 1.0 if is_lm(column) else 100.0, digits(column)
    text = f"{estimate.mean * factor:.{places}f}"
    if estimate.interval is None:
        return text + "*" * estimate.n
    return f"{text} ± {(estimate.interval[1] - estimate.mean) * factor:.{places}f}"


CELLS = (
    "Percent (losses: nats per token); mean over runs ± half of the 95% interval, * one run. "
    "Each at its best setting by the mean validation score; full fine-tuning and LoRA choose among "
    "the settings that BASE and PMP both completed."
)

Row = tuple[tuple[str, str], Levels]


def _table(
    name: str,
    caption: str,
    labels: tuple[str, str],
    rows: Sequence[Row],
    title: Callable[[str], str],
) -> Table:
    columns = ordered({column for _, found in rows for column in found})
    return Table(
        name,
        f"{caption} {CELLS}",
        (*labels, *map(title, columns)),
        [(*own, *(cell(found.get(c), c) for c in columns)) for own, found in rows if found],
    )


def table_one(results: Sequence[Result], runs: Sequence[FineTune]) -> Table:
    """Return the paper's Table 1, beside the majority class and fine-tuning from scratch."""
    names = arms(r.arm for r in results if r.kind in ("finetune", *HEADS))
    exact = {column: Estimate(mean=value, n=0) for column, value in majority(results).items()}
    rows: list[Row] = [(("Majority class", "-"), exact)]
    for kind, words in HEADS.items():
        rows += [((words, arm), heads(results, arm, kind)) for arm in names]
    for method in reversed(reported(Role.ATTACK)):
        rows += [((method.title, arm), fine_tuned(runs, arm, [method])) for arm in names]
    rows.append((("Full from scratch", "-"), tuned(run for run in runs if run.scratch)))
    caption = "Table 1. GLUE validation, accuracy-style scores."
    return _table("table1", caption, ("Stage", "Arm"), rows, head)


def table_methods(runs: Sequence[FineTune]) -> Table:
    """Compare authorized with unauthorized on every arm, with the controls."""
    return _table("methods", "Fine-tuning methods.", ("Arm", "Method"), _methods(runs), head)


def table_canonical(runs: Sequence[FineTune]) -> Table:
    """Return the tasks' own metrics; each arm and method at the setting best in that metric."""
    glue = [run for run in runs if not is_lm(run.task)]
    names = {column: metric for run in glue for column, metric in run.primary.items()}
    rows = _methods(glue, primary=True)
    caption = "Each task's canonical metric."
    return _table(
        "canonical", caption, ("Arm", "Method"), rows, lambda column: f"{column} ({names[column]})"
    )


def _methods(runs: Sequence[FineTune], *, primary: bool = False) -> list[Row]:
    return [
        ((arm, method.title), fine_tuned(runs, arm, [method], primary=primary))
        for arm in arms(run.arm for run in runs)
        for method in reported()
    ]


def table_other(results: Sequence[Result]) -> Table:
    """Return one line per arm and measurement; with several models of an arm one line each."""
    found = [(result.arm, *line) for result in results for line in _lines(result)]
    order = arms(arm for arm, *_ in found)
    found.sort(key=lambda line: (line[1], order.index(line[0])))
    return Table(
        "models", "The models as they are released.", ("Arm", "Measurement", "Value"), found
    )


def _lines(result: Result) -> Iterator[tuple[str, str]]:
    values, settings = result.values, result.settings
    match result.kind:
        case "pretrain":
            tokens = f"{settings['tokens']:,}"
            yield f"Pretraining: validation loss after {tokens} tokens", _nats(values["val_loss"])
        case "perplexity":
            text = f"{settings.get('split', 'validation')} text {str(settings['store'])[:6]}"
            yield f"Loss on {text}", _nats(values["loss"])
        case "last_word":
            yield "Last word, accuracy", f"{100 * values['accuracy']:.2f}%"
        case "lm_eval":
            for name, metrics in values["metrics"].items():
                for metric, value in metrics.items():
                    yield f"lm-eval {name}, {metric.removesuffix(',none')}", f"{value:.4g}"


def _nats(loss: float) -> str:
    return f"{loss:.4f} nats per token"


def head(column: str) -> str:
    return f"{column} (nats)" if is_lm(column) else column
