"""The paper's Table 1 and its companions: what each arm scores at each stage."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from pmp_ds.finetune import method as tuning
from pmp_ds.finetune.method import UNAUTHORIZED
from pmp_ds.results import Result
from pmp_ds.study.runs import (
    AVERAGE,
    BASE,
    PMP,
    RANDOM,
    RECOVERED,
    Cell,
    FineTune,
    Unit,
    best,
    by_method,
    cells,
    is_lm,
    ordered,
    pick,
    samples,
    tasks,
    with_average,
)
from pmp_ds.study.statistics import Estimate, level
from pmp_ds.study.tables import Table

_TITLES = [(name, one.title) for name, one in tuning.METHODS.items()]
METHODS = dict([*_TITLES[:-1], (RECOVERED, "With a recovered mask"), _TITLES[-1]])
HEADS = {"untrained-head": "Untrained head", "zero-shot": "Zero-shot"}

Levels = Mapping[str, Estimate]
"""column -> mean with interval: fractions, nats per token for losses."""


def arms(names: Iterable[str]) -> list[str]:
    """Those with a role first."""
    order = {arm: i for i, arm in enumerate((BASE, PMP, RANDOM))}
    return sorted(set(names), key=lambda arm: (order.get(arm, len(order)), arm))


def levels(found: Mapping[str, Mapping[Unit, float]]) -> Levels:
    return {c: level([-v if is_lm(c) else v for v in u.values()]) for c, u in found.items()}


def fine_tuned(
    runs: Sequence[FineTune], arm: str, methods: Sequence[str], *, primary: bool = False
) -> Levels:
    """The best cell of each task. Without the mask, every arm chooses among the cells that BASE and
    PMP both completed, so that none has more tries than another."""
    found: dict[str, Mapping[Unit, float]] = {}
    for task in tasks(runs):
        own = [run for run in pick(runs, arm=arm, methods=methods) if run.task == task]
        grid = _grid(runs, task, methods) if set(methods) <= set(UNAUTHORIZED) else None
        chosen = best(own, grid, by_method, primary=primary)
        found.update(samples(chosen, primary=primary))
    return levels(found if primary else with_average(found))


def _grid(runs: Sequence[FineTune], task: str, methods: Sequence[str]) -> set[Cell]:
    sides = (
        cells([r for r in pick(runs, arm=arm, methods=methods) if r.task == task], by_method)
        for arm in (BASE, PMP)
    )
    return set.intersection(*map(set, sides))


def from_scratch(runs: Sequence[FineTune]) -> Levels:
    """The best cell of each task among the runs that started from initial weights."""
    own = [run for run in runs if run.scratch]
    found: dict[str, Mapping[Unit, float]] = {}
    for task in tasks(own):
        found.update(samples(best(run for run in own if run.task == task)))
    return levels(with_average(found))


def heads(results: Iterable[Result], arm: str, kind: str) -> Levels:
    """Accuracies without any fine-tuning, over the seeds."""
    found: dict[str, dict[Unit, float]] = {}
    for result in results:
        if result.kind == kind and result.arm == arm:
            for column, values in result.values["metrics"].items():
                unit = (result.model_digest, result.settings.get("seed", 0))
                found.setdefault(column, {})[unit] = values["accuracy"]
    return levels(with_average(found))


def majority(results: Iterable[Result]) -> dict[str, float]:
    """column -> accuracy of the most frequent label, and the average."""
    found = {
        column: values["accuracy"]
        for result in results
        for column, values in result.values.get("majority", {}).items()
        if "accuracy" in values
    }
    return found | ({AVERAGE: sum(found.values()) / len(found)} if len(found) > 1 else {})


def cell(estimate: Estimate | None, column: str) -> str:
    """`83.1 ± 0.4` in percent, or nats; an asterisk stands for one seed."""
    if estimate is None:
        return "-"
    factor, digits = (1.0, 4) if is_lm(column) else (100.0, 2)
    text = f"{estimate.mean * factor:.{digits}f}"
    if estimate.high is None:
        return f"{text}*"
    return f"{text} ± {(estimate.high - estimate.mean) * factor:.{digits}f}"


CELLS = (
    "Percent (losses: nats per token); mean over runs ± half of the 95% interval, * one run. "
    "Each at its best setting by the mean validation score; full fine-tuning and LoRA choose among "
    "the settings that BASE and PMP both completed."
)


def table_one(results: Sequence[Result], runs: Sequence[FineTune]) -> Table:
    """The paper's Table 1, beside the majority class and fine-tuning from scratch."""
    rows: list[tuple[str, str, Levels]] = []
    names = arms(r.arm for r in results if r.kind in ("finetune", *HEADS))
    for kind, words in HEADS.items():
        rows += [(words, arm, heads(results, arm, kind)) for arm in names]
    for method in reversed(UNAUTHORIZED):
        rows += [(METHODS[method], arm, fine_tuned(runs, arm, (method,))) for arm in names]
    rows.append(("Full from scratch", "-", from_scratch(runs)))
    classes = {c: Estimate(mean=v, n=1, low=v, high=v) for c, v in majority(results).items()}
    columns = ordered({c for _, _, found in rows for c in found})
    text = [(s, arm, *(cell(lv.get(c), c) for c in columns)) for s, arm, lv in rows if lv]
    if classes:
        exact = (f"{100 * classes[c].mean:.2f}" if c in classes else "-" for c in columns)
        text.insert(0, ("Majority class", "-", *exact))
    return Table(
        "table1",
        f"Table 1. GLUE validation, accuracy-style scores. {CELLS}",
        ("Stage", "Arm", *map(head, columns)),
        text,
    )


def table_methods(runs: Sequence[FineTune]) -> Table:
    """Authorized against unauthorized on every arm, with the controls."""
    rows = []
    for arm in arms(run.arm for run in runs):
        for method, words in METHODS.items():
            if found := fine_tuned(runs, arm, (method,)):
                rows.append((arm, words, found))
    columns = ordered({c for *_, found in rows for c in found})
    return Table(
        "methods",
        f"Fine-tuning methods. {CELLS}",
        ("Arm", "Method", *map(head, columns)),
        [(arm, words, *(cell(found.get(c), c) for c in columns)) for arm, words, found in rows],
    )


def table_canonical(runs: Sequence[FineTune]) -> Table:
    """The tasks' own metrics; each arm and method at the setting best in that metric."""
    glue = [run for run in runs if not is_lm(run.task)]
    rows = []
    for arm in arms(run.arm for run in glue):
        for method, words in METHODS.items():
            if found := fine_tuned(glue, arm, (method,), primary=True):
                rows.append((arm, words, found))
    names = {c: metric for run in glue for c, metric in run.primary.items()}
    columns = ordered({c for *_, found in rows for c in found})
    return Table(
        "canonical",
        f"Each task's canonical metric. {CELLS}",
        ("Arm", "Method", *(f"{c} ({names[c]})" for c in columns)),
        [(arm, words, *(cell(found.get(c), c) for c in columns)) for arm, words, found in rows],
    )


def table_other(results: Sequence[Result]) -> Table:
    """One line per arm and measurement; with several models of an arm one line each."""
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
    return f"{column} (nats)" if is_lm(column) else "Average" if column == AVERAGE else column
