"""Plots of a run, drawn from its metrics.jsonl."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from pmp_ds.log import read_metrics
from pmp_ds.run_dir import RunDir
from pmp_ds.state.run_record import load_config, read_data

BLUE, ORANGE, GREY = "#2a6fbb", "#d9822b", "#888888"


def plot_run(run: RunDir) -> list[Path]:
    """Write plots/iou.png (after a discovery) and plots/loss.png; return their paths."""
    run.plots.mkdir(exist_ok=True)
    return plot_into(run, read_metrics(run.metrics), run.plots)


def plot_into(run: RunDir, records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write iou.png and loss.png of a run's ``records`` to ``folder``; return their paths."""
    paths = []
    ious = _series(records, "discover", "iou")
    if ious[0]:
        paths.append(_plot_iou(run, folder, *ious))
    paths.append(_plot_loss(run, folder, records))
    return paths


def plot_throughput(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write throughput.png to ``folder`` if the records tell it, with a mark where a start
    resumed."""
    steps, rates = _series(records, "train", "tokens_per_second")
    if not steps:
        return []
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, rates, color=BLUE, linewidth=0.8)
    starts = [r.get("start", 1) for r in records if r["phase"] == "train" and "loss" in r]
    for step, before, now in zip(steps[1:], starts, starts[1:], strict=False):
        if before != now:
            axes.axvline(step, color=ORANGE, linestyle="--")
    axes.set(xlabel="update", ylabel="tokens per second", ylim=(0, None))
    return [_save(figure, folder / "throughput.png")]


def _series(records: list[dict[str, Any]], phase: str, name: str) -> tuple[list[int], list[float]]:
    rows = [r for r in records if r["phase"] == phase and name in r]
    return [r["step"] for r in rows], [float(r[name]) for r in rows]


def _plot_iou(run: RunDir, folder: Path, steps: list[int], ious: list[float]) -> Path:
    mask = load_config(run).mask
    chance = mask.density / (2.0 - mask.density)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, ious, color=BLUE, marker=".", label=f"consecutive masks, score {mask.score}")
    axes.axhline(
        mask.iou_threshold,
        color=ORANGE,
        linestyle="--",
        label=f"stable from {mask.iou_threshold:g}, {mask.patience} in a row",
    )
    axes.axhline(
        chance, color=GREY, linestyle=":", label=f"two random masks of this density: {chance:.2f}"
    )
    axes.set(
        xlabel="discovery update",
        ylabel="IoU with the previous mask",
        ylim=(min(chance, *ious) - 0.03, 1.01),
        title="Is the ticket stable?",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center right", frameon=False)
    return _save(figure, folder / "iou.png")


def _plot_loss(run: RunDir, folder: Path, records: list[dict[str, Any]]) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*_series(records, "train", "loss"), color=BLUE, linewidth=0.8, label="training")
    axes.plot(
        *_series(records, "train", "val_loss"),
        color=ORANGE,
        marker="o",
        markersize=3,
        label="validation",
    )
    unigram = read_data(run).unigram_cross_entropy
    label = f"token frequencies alone: {unigram:.2f}"
    axes.axhline(unigram, color=GREY, linestyle=":", label=label)
    axes.set(xlabel="update", ylabel="loss (nats per token)", title="Masked pretraining")
    axes.legend(frameon=False)
    return _save(figure, folder / "loss.png")


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
