"""The controls a reviewer asks for: which of them the results hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmp_ds.finetune.method import FULL, Method, Role, reported
from pmp_ds.results import Result
from pmp_ds.study.choice import best
from pmp_ds.study.runs import BASE, CONTINUED, PMP, RANDOM, FineTune, by_task, pick

LR_RANGE = 1e-5, 3e-3
SCORES = "mean", "ema", "gradient"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Control:
    name: str
    found: str
    """What was run, or `not run` with what is missing."""

    @property
    def run(self) -> bool:
        return not self.found.startswith(NOT_RUN)


def controls(results: Sequence[Result], runs: Sequence[FineTune]) -> list[Control]:
    """Return every control, run or not."""
    pretrained = [result for result in results if result.kind == "pretrain"]
    heads = sum(result.kind == "untrained-head" for result in results)

    def tuned(*methods: Method) -> list[FineTune]:
        return pick(runs, PMP, methods)

    rows = {
        "BASE at equal budget": _budget(pretrained),
        "Random mask at equal density, pretrained": _random_arm(pretrained, runs),
        "Random mask at equal density, fine-tuned on PMP": _count(tuned(*reported(Role.GUESS))),
        **{f"{m.title}, fine-tuned on PMP": _count(tuned(m)) for m in reported(Role.CONTROL)},
        "Mask recovered by an attack, fine-tuned on PMP": _count(tuned(*reported(Role.RECOVERED))),
        "Fine-tuning from scratch": _count([run for run in runs if run.scratch]),
        "Untrained head": f"{heads} measurements" if heads else "",
        "Learning rates from 1e-5 to 3e-3": _learning_rates(runs),
        "Longer fine-tuning": _epochs(runs),
        "Continued full pretraining of the release": _count(
            [run for run in tuned(FULL) if run.task == CONTINUED]
        ),
        "Densities 0.5 to 1.0": _densities(pretrained),
        "Ticket from each score": _scores(pretrained),
        "Several fine-tuning seeds": _seeds(runs),
        "Several pretraining seeds": _pretraining_seeds(pretrained),
    }
    return [Control(name, found or NOT_RUN) for name, found in rows.items()]


def _of(pretrained: Sequence[Result], arm: str, setting: str) -> set[Any]:
    """The values of a setting that an arm was pretrained with."""
    return {r.settings[setting] for r in pretrained if r.arm == arm}


def _budget(pretrained: Sequence[Result]) -> str:
    base, pmp = (_of(pretrained, arm, "tokens") for arm in (BASE, PMP))
    words = [" or ".join(f"{count:,}" for count in sorted(counts)) for counts in (base, pmp)]
    if not (base and pmp):
        return ""
    if base == pmp:
        return f"{words[0]} tokens each"
    return f"{NOT_RUN}: BASE had {words[0]} tokens, PMP {words[1]}"


def _random_arm(pretrained: Sequence[Result], runs: Sequence[FineTune]) -> str:
    density, other = (_of(pretrained, arm, "density") for arm in (PMP, RANDOM))
    if not other:
        return ""
    if density != other:
        return f"{NOT_RUN}: density {_list(other)} against {_list(density)}"
    return f"density {_list(other)}" + ("" if pick(runs, RANDOM) else ", not fine-tuned")


def _list(values: set[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values))


def _count(runs: Sequence[FineTune]) -> str:
    return f"{len(runs)} runs, tasks {', '.join(by_task(runs))}" if runs else ""


def _both(runs: Sequence[FineTune], name: str) -> list[float]:
    """Values of a setting that the attackers of both BASE and PMP have."""
    sides = ({r.setting(name) for r in pick(runs, arm)} for arm in (BASE, PMP))
    return sorted(set.intersection(*sides) - {None})


def _learning_rates(runs: Sequence[FineTune]) -> str:
    found = _both(runs, "lr")
    if not found:
        return ""
    text = f"{len(found)} from {found[0]:g} to {found[-1]:g}, for both BASE and PMP"
    inside = found[0] <= LR_RANGE[0] * 1.001 and found[-1] >= LR_RANGE[1] * 0.999
    return text if inside else f"{NOT_RUN} in full: {text}"


def _epochs(runs: Sequence[FineTune]) -> str:
    found = _both(runs, "epochs")
    return f"epochs {_list(set(found))}, for both BASE and PMP" if len(found) > 1 else ""


def _densities(pretrained: Sequence[Result]) -> str:
    found = {r.settings["density"] for r in pretrained if r.settings["source"] != "random"}
    if len(found) < 3:
        return ""
    text = f"densities {_list(found)}"
    whole = min(found) <= 0.5 and max(found) == 1.0
    return text if whole else f"{NOT_RUN} in full: {text}"


def _scores(pretrained: Sequence[Result]) -> str:
    found = {r.settings["score"] for r in pretrained if r.settings["source"] == "earlybird"}
    missing = ", ".join(score for score in SCORES if score not in found)
    return f"{NOT_RUN}: {missing}" if missing else ", ".join(SCORES)


def _seeds(runs: Sequence[FineTune]) -> str:
    seeds = {run.seed for run in runs if not run.scratch}
    return f"{len(seeds)} seeds" if len(seeds) > 1 else f"{NOT_RUN}: one seed" if seeds else ""


def _pretraining_seeds(pretrained: Sequence[Result]) -> str:
    counts = {arm: len(_of(pretrained, arm, "seed")) for arm in (BASE, PMP)}
    if not all(counts.values()):
        return ""
    if min(counts.values()) == 1:
        return f"{NOT_RUN}: one model stands for an arm, and no interval covers its chance"
    return ", ".join(f"{count} of {arm}" for arm, count in counts.items())


def edges(runs: Sequence[FineTune]) -> list[str]:
    """Return the sweeps whose best learning rate is the first or the last one tried: it may lie
    beyond."""
    found = []
    for arm in (BASE, PMP):
        for task, own in by_task(runs).items():
            for method in reported(Role.ATTACK, Role.AUTHORIZED):
                sweep = pick(own, arm, [method])
                tried = sorted({run.setting("lr") for run in sweep} - {None})
                lr = best(sweep)[0].setting("lr") if sweep else None
                if len(tried) > 2 and lr in (tried[0], tried[-1]):
                    found.append(f"{arm}, {task}, {method.name}: {lr:g}")
    return found
