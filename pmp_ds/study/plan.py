"""A study as the commands that make it, in order, and which of them are done."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pmp_ds.cli import parse
from pmp_ds.config import Config
from pmp_ds.finetune.config import FinetuneConfig
from pmp_ds.finetune.method import METHODS, Role
from pmp_ds.run_dir import RunDir, read_json
from pmp_ds.study.recipe import Arm, Study, Tuning

_VOCAB = 1 << 18  # stands for that of a tokenizer that may not be there yet
_COMMANDS = "pmp_ds.commands."
ROOT = "{root}"
"""Stands for the study's folder in settings, which name files of its other runs with it."""


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    """Of its marker and log as well."""
    argv: tuple[str, ...]
    """`-m`, the module of a command, and its flags."""
    output: Path
    """What is there once it is done."""
    ranks: bool = False
    """Trains, so it goes through the launcher of ranks."""
    cells: int = 1
    """Measurements it makes."""
    may_leak: bool = False
    """Exit code 1 is a finding."""
    independent: bool = False
    """Needs no step but those before it that are not independent: may run beside others."""

    def marker(self, root: Path) -> Path:
        """Return the file that says that it is done."""
        return root / "done" / f"{self.name}.json"

    def is_done(self, root: Path) -> bool:
        """Return whether it has run with this very command and its output is still there."""
        where = self.marker(root)
        if not (where.exists() and self.output.exists()):
            return False
        words = list(read_json(where).get("argv") or [""])
        if words[0].endswith(".py"):  # written by pmp-ds 0.1.0.dev, which ran files
            words[:1] = _argv(Path(words[0]).stem)
        return words == list(self.argv)


def steps(study: Study) -> list[Step]:
    """Return every command but the report. Raises UserError for an arm that cannot be
    configured."""
    parts = _prepare, _pretrain, _tune, _evaluate, _audit
    return [
        replace(step, argv=tuple(word.replace(ROOT, study.root) for word in step.argv))
        for part in parts
        for step in part(study)
    ]


def report_argv(study: Study) -> tuple[str, ...]:
    """Return the last command; it always runs."""
    root = Path(study.root)
    runs = [f"{_label(study, arm)}={run_of(study, arm).root}" for arm in study.arms]
    audits = [str(root / "audit" / arm / "audit.json") for arm in study.audit.arms]
    flags = {"study": root, "collect": runs, **({"audit": audits} if audits else {})}
    return _argv("report", flags)


def run_of(study: Study, arm: str) -> RunDir:
    return RunDir(Path(study.root) / "runs" / arm)


def _label(study: Study, arm: str) -> str:
    """What results call the arm: pretraining seeds of one arm share its name."""
    return study.arms[arm].seed_of or arm


def _prepare(study: Study) -> Iterator[Step]:
    for store, flags in study.stores.items():
        argv = _argv("prepare_data", {"out": store, **flags})
        yield Step(f"prepare-{Path(store).name}", argv, Path(store) / "manifest.json")


def _pretrain(study: Study) -> Iterator[Step]:
    for name, arm in study.arms.items():
        run, flags = run_of(study, name), _arm_flags(study, name, arm)
        parse(Config, flags)  # its mistakes before the first hour
        argv = (*_argv("pretrain"), *flags)
        yield Step(f"pretrain-{name}", argv, run.checkpoints, ranks=True)
        yield Step(f"export-{name}", _argv("export", {"run": run.root}), run.release)


def rehearse_arms(study: Study, planned: Sequence[Step]) -> None:
    """Raise UserError for an arm, not pretrained yet, whose model could not be released."""
    from pmp_ds.model.build import model_config  # imports transformers: seconds
    from pmp_ds.release.rehearsal import rehearse

    todo = {step.name for step in planned if not step.is_done(Path(study.root))}
    seen = []
    for name, arm in study.arms.items():
        config, _ = parse(Config, _arm_flags(study, name, arm))
        what = (config.model, config.init.is_drawn_in_secret, config.init.weights)
        if f"pretrain-{name}" not in todo or what in seen:
            continue
        seen.append(what)
        rows = config.model.vocab_size or _VOCAB
        base = Path(config.init.weights) if config.init.weights is not None else None
        hf_config = model_config(
            config.model, vocab_size=rows, eos_id=0, bos_id=None, block_size=1, base=base
        )
        rehearse(hf_config, secret=what[1])


def _arm_flags(study: Study, name: str, arm: Arm) -> list[str]:
    configs = [word for path in arm.configs for word in ("--config", path)]
    where = {"run.root": Path(study.root) / "runs", "run.name": name}
    return [*configs, *_flags(arm.settings), *_flags(where)]


def _tune(study: Study) -> Iterator[Step]:
    for number, tuning in enumerate(study.tunings):
        for arm in tuning.arms:
            for task in tuning.tasks:
                step = _tuning(study, tuning, arm, task, f"{number}-{arm}-{task}")
                if (arm, task) == (tuning.arms[0], tuning.tasks[0]):
                    _check_tuning(step)
                yield step


def _density(study: Study, arm: str) -> float:
    config, _ = parse(Config, _arm_flags(study, arm, study.arms[arm]))
    return config.mask.density


def _check_tuning(step: Step) -> None:
    """Its mistakes before the first hour: the settings of its first cell."""
    words = list(step.argv[2:])
    for place, word in enumerate(words):
        if word == "--sweep":
            setting, _, values = words[place + 1].partition("=")
            words[place : place + 2] = [f"--{setting}", values.partition(",")[0]]
    parse(FinetuneConfig, words)


def _tuning(study: Study, tuning: Tuning, arm: str, task: str, name: str) -> Step:
    root, run = Path(study.root), run_of(study, arm)
    methods = [METHODS[name] for name in tuning.methods if name in METHODS]
    flags: dict[str, object] = {
        "model": run.release,
        "task": task,
        "arm": _label(study, arm),
        "results": root / "results.jsonl",
        "run.root": root / "finetune",
        "run.name": name,
    }
    if any(method.needs_ticket for method in methods):
        flags["ticket"] = run.ticket
    if any(method.role is Role.GUESS for method in methods) and "density" not in tuning.settings:
        flags["density"] = _density(study, arm)
    grid: dict[str, Sequence[object]] = {"method": tuning.methods, **tuning.sweep}
    argv = [*_argv("finetune", flags), *_flags(tuning.settings)]
    for setting, values in grid.items():
        argv += ["--sweep", f"{setting}={','.join(map(_word, values))}"]
    cells = math.prod(len(values) for values in grid.values())
    output = root / "results.jsonl"
    return Step(f"finetune-{name}", tuple(argv), output, ranks=True, cells=cells, independent=True)


def _evaluate(study: Study) -> Iterator[Step]:
    output = Path(study.root) / "results.jsonl"
    for number, evaluation in enumerate(study.evaluations):
        for arm in evaluation.arms:
            run, measures = run_of(study, arm), evaluation.measures
            flags = {"model": run.release, "arm": _label(study, arm), "results": output}
            if {"landscape", "gradients"} & set(measures):
                flags["ticket"] = run.ticket
            argv = (*_argv("evaluate"), *measures, *_flags(flags), *_flags(evaluation.settings))
            name = f"evaluate-{number}-{arm}"
            yield Step(name, argv, output, cells=len(measures), independent=True)


def _audit(study: Study) -> Iterator[Step]:
    for arm in study.audit.arms:
        run, out = run_of(study, arm), Path(study.root) / "audit" / arm
        flags = {"release": run.release, "ticket": run.ticket, "config": run.config, "out": out}
        argv = (*_argv("audit", flags), *_flags(study.audit.settings))
        yield Step(f"audit-{arm}", argv, out / "audit.json", may_leak=True, independent=True)


def _argv(verb: str, flags: Mapping[str, object] | None = None) -> tuple[str, ...]:
    """Return what Python starts `pmp-ds VERB` with: a module, which an installed wheel has too."""
    return ("-m", f"{_COMMANDS}{verb}", *_flags(flags or {}))


def _flags(flags: Mapping[str, object]) -> list[str]:
    words: list[str] = []
    for name, value in flags.items():
        given = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(_word(one) for one in given)]
    return words


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe(study: Study, planned: Sequence[Step]) -> str:
    """Return the plan with counts: what is done, what is to do."""
    root = Path(study.root)
    lines = []
    for step in planned:
        count = f"{step.cells} cells" if step.cells > 1 else ""
        state = "done" if step.is_done(root) else "to do"
        lines.append(f"  {state:<6}{step.name:<40}{count}".rstrip())
    todo = [step for step in planned if not step.is_done(root)]
    tunings = sum(step.cells for step in planned if step.name.startswith("finetune-"))
    lines.append(
        f"{len(planned)} steps, {len(todo)} to do; {len(study.arms)} models, {tunings} "
        f"fine-tunings; then the report, {root}/report/"
    )
    return "\n".join(lines)
