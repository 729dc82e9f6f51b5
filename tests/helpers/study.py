"""Invented results of studies, with planted effects.

records = study(gap=5.0, secret=2.0, tax=0.0, seeds=5)     # points, points, nats per token
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from pmp_ds.results import Result

COLUMNS = {
    "cola": ("CoLA",),
    "sst2": ("SST-2",),
    "mrpc": ("MRPC",),
    "qqp": ("QQP",),
    "stsb": ("STS-B",),
    "mnli": ("MNLI-m", "MNLI-mm"),
    "qnli": ("QNLI",),
    "rte": ("RTE",),
}
PRIMARY = {"CoLA": "mcc", "STS-B": "pearson"}
LRS = (1e-5, 1e-4, 1e-3, 3e-3)
LEVEL = {
    "CoLA": 0.69,
    "SST-2": 0.82,
    "MRPC": 0.71,
    "QQP": 0.84,
    "STS-B": 0.3,
    "MNLI-m": 0.7,
    "MNLI-mm": 0.71,
    "QNLI": 0.79,
    "RTE": 0.56,
}
MAJORITY = {
    "CoLA": 0.691,
    "SST-2": 0.509,
    "MRPC": 0.684,
    "QQP": 0.632,
    "STS-B": 0.2,
    "MNLI-m": 0.354,
    "MNLI-mm": 0.352,
    "QNLI": 0.505,
    "RTE": 0.527,
}
BEST_LR = 1e-4


def result(kind: str, arm: str, settings: dict[str, Any], values: dict[str, Any]) -> Result:
    return Result(
        kind=kind,
        arm=arm,
        model=f"runs/{arm}/release",
        model_digest=f"digest of {arm}",
        settings=settings,
        values=values,
        seconds=1.0,
        hardware="none",
        date="2026-01-02",
        version="0.1.0",
    )


def fine_tune(
    arm: str,
    task: str,
    method: str,
    *,
    score: float,
    lr: float = BEST_LR,
    epochs: int = 3,
    seed: int = 0,
    scratch: bool = False,
    **settings: Any,
) -> Result:
    """Return a run whose columns all equal ``score``: an accuracy, or nats per token for ``lm``."""
    columns = COLUMNS.get(task, ("LM",))
    if task == "lm":
        metrics = {"LM": {"loss": score}}
        curve = [[t, score + 2.0 * math.exp(-t / 20000)] for t in range(0, 100001, 10000)]
    else:
        metrics = {c: {"accuracy": score, PRIMARY.get(c, "accuracy"): score} for c in columns}
        curve = [[t, score * (1 - 0.4 * math.exp(-t / 200))] for t in range(0, 1001, 100)]
    return result(
        "finetune",
        arm,
        {
            "task": task,
            "method": method,
            "lr": lr,
            "epochs": epochs,
            "seed": seed,
            "scratch": scratch,
            "global_batch_size": 32,
            "data": f"data of {task}",
            **settings,
        },
        {
            "metrics": metrics,
            "curve": curve,
            "tokens": 100_000,
            "trainable": 1_000,
            "majority": {c: {"accuracy": MAJORITY[c]} for c in columns if c in MAJORITY},
            "primary": {c: PRIMARY.get(c, "loss" if c == "LM" else "accuracy") for c in columns},
        },
    )


def pretrain(
    arm: str,
    *,
    loss: float,
    density: float = 0.7,
    source: str = "earlybird",
    score: str = "mean",
    seed: int = 0,
    tokens: int = 20_000_000,
) -> Result:
    found = source == "earlybird"
    return result(
        "pretrain",
        arm,
        {
            "density": 1.0 if source == "none" else density,
            "source": source,
            "score": score if found else None,
            "steps": 2000,
            "tokens": tokens,
            "seed": seed,
            "data": "data of pretraining",
        },
        {
            "val_loss": loss,
            "curve": [[t, loss + 5 * math.exp(-t / 3e6)] for t in range(0, tokens + 1, 1_000_000)],
            "iou": [1 - 0.4 * math.exp(-i / (4 if score == "mean" else 40)) for i in range(20)]
            if found
            else [],
        },
    )


def study(
    *,
    gap: float,
    secret: float,
    tax: float,
    authorized: float = 1.0,
    seeds: int = 5,
    spread: float = 0.4,
    tasks: Sequence[str] = (*COLUMNS, "lm"),
    lrs: Sequence[float] = LRS,
    extra_arms: Sequence[str] = (),
    luck: int = 0,
) -> list[Result]:
    """Return arms base, pmp and random. Effects are percentage points for GLUE and hundredths of a
    nat for LM. Half of ``spread`` over seeds belongs to the seed, equal for all arms, and half to
    the run."""
    draw = random.Random(luck)
    shared = [draw.gauss(0.0, spread / 2) for _ in range(seeds)]

    def runs(arm: str, method: str, points: float, **settings: Any) -> Iterator[Result]:
        for task in tasks:
            for lr in lrs:
                for seed in range(seeds):
                    worse = abs(math.log10(lr / BEST_LR)) * 6.0
                    value = points - worse + shared[seed] + draw.gauss(0.0, spread / 2)
                    at = 3.0 if task == "lm" else LEVEL[COLUMNS[task][0]]
                    score = at - value / 100 if task == "lm" else at + value / 100
                    yield fine_tune(arm, task, method, score=score, lr=lr, seed=seed, **settings)

    found = [pretrain("base", loss=3.0, source="none"), pretrain("pmp", loss=3.0 + tax)]
    found.append(pretrain("random", loss=3.02 + tax, source="random"))
    arms = {"base": 0.0, "pmp": -gap, "random": -gap / 2} | dict.fromkeys(extra_arms, -gap)
    for arm, points in arms.items():
        for method in ("full", "lora"):
            found += runs(arm, method, points - (1.0 if method == "lora" else 0.0))
        for seed in range(seeds):
            metrics = {c: {"accuracy": 0.5 + draw.gauss(0, 0.02)} for c in LEVEL}
            settings = {"task": "all", "seed": seed}
            found.append(result("untrained-head", arm, settings, {"metrics": metrics}))
    found += runs("pmp", "ticket", authorized - gap)
    found += runs("pmp", "random", authorized - gap - secret)
    found += runs("base", "full", -15.0, scratch=True)
    return found


def sweeps() -> list[Result]:
    """Add densities, scores and epochs to ``study``."""
    found = []
    for density in (0.5, 0.6, 0.8, 0.9):
        arm = f"pmp-{density:g}"
        found.append(pretrain(arm, loss=3.0 + (1 - density) / 10, density=density))
        found += [
            fine_tune(arm, task, "full", score=LEVEL[COLUMNS[task][0]] - 0.02, seed=seed)
            for task in COLUMNS
            for seed in range(3)
        ]
    for score in ("ema", "gradient"):
        found.append(pretrain(f"pmp-{score}", loss=3.01, score=score))
    for epochs in (1, 6, 12):
        for arm in ("base", "pmp"):
            found += [
                fine_tune(
                    arm, "qnli", "full", score=0.7 + 0.01 * min(epochs, 4), epochs=epochs, seed=s
                )
                for s in range(5)
            ]
    return found


def instruments(arm: str = "pmp") -> list[Result]:
    """Return a landscape and gradient histograms."""
    alphas = [i / 20 for i in range(-10, 11)]

    def losses(steep: float) -> list[list[float]]:
        return [[3.0 + steep * (1 + s / 10) * a * a for a in alphas] for s in range(3)]

    directions = {
        name: {"global": losses(steep), "per_tensor": losses(steep / 2), "per_row": losses(1.0)}
        for name, steep in (("ticket", 4.0), ("full", 9.0), ("complement", 20.0))
    }
    edges = [-12 + i / 4 for i in range(45)]

    def counts(centre: float, total: float) -> list[int]:
        return [int(total * math.exp(-((e - centre) ** 2))) for e in edges[:-1]]

    return [
        result("landscape", arm, {"seed": 0}, {"alphas": alphas, "directions": directions}),
        result(
            "gradients",
            arm,
            {"seed": 0},
            {
                "edges_log10": edges,
                "ticket": counts(-5, 7e4),
                "complement": counts(-5.6, 3e4),
                "zeros": {"ticket": 10, "complement": 900},
                "auc": 0.68,
            },
        ),
    ]


def audit() -> dict[str, Any]:
    """Return the content of an audit.json."""

    def row(attack: str, verdict: str, iou: float | None) -> dict[str, Any]:
        return {
            "attack": attack,
            "needs": "",
            "verdict": verdict,
            "auc": iou,
            "auc_outside_embeddings": None,
            "iou": iou,
            "chance_iou": None if iou is None else 0.538,
            "preventable": verdict == "leak",
            "countermeasure": "",
            "note": "",
            "seconds": 1.0,
        }

    rows = [
        row("seed replay", "chance", 0.54),
        row("shadow model", "open", 0.876),
        row("difference with a known base", "not run", None),
    ]
    return {"format_version": 1, "release": "runs/pmp/release", "leaks": [], "attacks": rows}
