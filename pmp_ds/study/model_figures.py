"""Pictures of the models: loss landscape, gradients, stability of the ticket, pretraining."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from pmp_ds.results import Result
from pmp_ds.study.figures import (
    COLOURS,
    GREY,
    Picture,
    look,
    not_run,
    one_legend,
    panels,
    save,
    short,
)
from pmp_ds.study.glue_tables import arms
from pmp_ds.study.runs import BASE

NORMS = {
    "global": "one norm for the whole direction",
    "per_tensor": "norms matched per tensor",
    "per_row": "norms matched per row",
}
TUNED = "the way of a fine-tuning, which ends at 1"
DIRECTIONS = {
    "ticket": "in the ticket (authorized)",
    "full": "in all parameters (unauthorized)",
    "complement": "in the complement",
}


def draw(folder: Path, results: Sequence[Result]) -> dict[str, Picture]:
    """Draw every picture that the results allow; returns them by name."""
    made = [_iou(folder, results), _pretraining(folder, results)]
    for kind, one in (("landscape", _landscape), ("gradients", _gradients)):
        by_arm = {result.arm: result for result in results if result.kind == kind}
        if by_arm:
            made.append(one(folder, [by_arm[arm] for arm in arms(by_arm)]))
    return {picture.name: picture for picture in made if picture is not None}


def _landscape(folder: Path, found: Sequence[Result]) -> Picture:
    """Figure 5: a row per arm, a panel per way of matching norms."""
    directions = [d for result in found for d in result.values["directions"].values()]
    modes = [mode for mode in NORMS if any(d.get(mode) for d in directions)]
    modes += [TUNED] if any("tuned" in result.values for result in found) else []
    size = max(7.0, 4.2 * len(modes)), 3.7 * len(found) + 0.5
    figure, grid = panels(len(found), len(modes), size, sharey="row")
    for row, result in zip(grid, found, strict=True):
        for axes, mode in zip(row, modes, strict=True):
            _landscape_panel(axes, *_lines(result.values, mode))
            axes.set_title(f"{short(result.arm)}\n{NORMS.get(mode, mode)}", fontsize=9)
        row[0].set_ylabel("loss (nats per token)")
    one_legend(figure, grid.flat)
    picture = Picture(
        "figure5",
        "Loss against the step along directions in the ticket and in all parameters.",
        "Figure 5. Loss at theta + alpha * direction: mean of the seeds, the band is their "
        "range. A difference that is only in the first panel is one of scale between tensors.",
    )
    return save(figure, folder, picture, "Figure 5. Loss along random directions")


Lines = dict[str, Sequence[Sequence[float]]]
"""Direction -> losses by seed and alpha."""


def _lines(values: dict[str, Any], mode: str) -> tuple[Sequence[float], Lines]:
    """The alphas of a panel and its losses."""
    if mode != TUNED:
        directions = values["directions"]
        return values["alphas"], {name: d[mode] for name, d in directions.items() if d.get(mode)}
    tuned = values.get("tuned", {"alphas": [], "losses": {}})
    return tuned["alphas"], {name: [losses] for name, losses in tuned["losses"].items()}


def _landscape_panel(axes: Axes, alphas: Sequence[float], lines: Lines) -> None:
    for i, (name, by_seed) in enumerate(lines.items()):
        losses = np.array(by_seed, dtype=float)  # (seeds, alphas)
        label = DIRECTIONS.get(name, name)
        axes.plot(alphas, losses.mean(axis=0), **look(i), markersize=3.5, label=label)
        band = {"color": look(i)["color"], "alpha": 0.2, "linewidth": 0}
        axes.fill_between(alphas, losses.min(axis=0), losses.max(axis=0), **band)
    if not lines:
        not_run(axes)
    axes.set_xlabel("alpha (step along the direction)")
    axes.grid(linewidth=0.3)


def _gradients(folder: Path, found: Sequence[Result]) -> Picture:
    """Figure 6, zeros stated instead of left out."""
    figure, grid = panels(len(found), 1, (7.4, 3.4 * len(found) + 0.4))
    for axes, result in zip(grid[:, 0], found, strict=True):
        _histograms(axes, result.values)
        auc = result.values.get("auc")
        title = short(result.arm) + ("" if auc is None else f": AUC of |gradient| {auc:.3f}")
        axes.set_title(title, fontsize=10)
    picture = Picture(
        "figure6",
        "Histograms of gradient magnitudes in the ticket and in the complement.",
        "Figure 6. Gradient magnitudes on held-out text. AUC 0.5 would tell an attacker nothing.",
    )
    return save(figure, folder, picture, "Figure 6. Gradients inside and outside the ticket")


def _histograms(axes: Axes, values: dict[str, Any]) -> None:
    edges = np.array(values["edges_log10"])
    counts = {name: np.array(values[name], dtype=float) for name in ("ticket", "complement")}
    for i, (name, own) in enumerate(counts.items()):
        zeros = values.get("zeros", {}).get(name)
        label = name if zeros is None else f"{name} ({zeros:,} exact zeros not shown)"
        axes.stairs(own, edges, color=COLOURS[i], label=label, linewidth=1.4)
        axes.stairs(own, edges, color=COLOURS[i], alpha=0.15, fill=True)
    shown = np.flatnonzero(sum(counts.values()))
    if shown.size:
        axes.set_xlim(edges[shown[0]], edges[shown[-1] + 1])
    axes.set(xlabel="log10 of |gradient|", ylabel="elements")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _pretrained(results: Sequence[Result], name: str) -> list[Result]:
    found = [r for r in results if r.kind == "pretrain" and r.values.get(name)]
    order = arms(r.arm for r in found)
    return sorted(found, key=lambda r: (order.index(r.arm), r.settings["seed"]))


def _label(result: Result, found: Sequence[Result]) -> str:
    several = sum(other.arm == result.arm for other in found) > 1
    return short(result.arm) + (f", seed {result.settings['seed']}" if several else "")


def _style(i: int, points: int, marks: int, label: str) -> dict[str, Any]:
    """Return the look of a long curve, with about ``marks`` markers on it."""
    return {
        **look(i),
        "markersize": 3,
        "markevery": max(1, points // marks),
        "linewidth": 1.2,
        "linestyle": "-" if i < len(COLOURS) else "--",
        "label": label,
    }


def _iou(folder: Path, results: Sequence[Result]) -> Picture | None:
    found = _pretrained(results, "iou")
    if not found:
        return None
    figure, ((axes,),) = panels(1, 1, (7.4, 4.4))
    for i, result in enumerate(found):
        ious = result.values["iou"]
        label = f"{_label(result, found)} (score {result.settings['score']})"
        axes.plot(range(2, len(ious) + 2), ious, **_style(i, len(ious), 15, label))
    density = found[0].settings["density"]
    label = f"two random masks of density {density:g}"
    axes.axhline(density / (2 - density), color=GREY, linestyle=":", label=label)
    axes.axhline(0.99, color="black", linestyle="--", linewidth=0.8, label="0.99")
    axes.set(xlabel="discovery update", ylabel="IoU with the previous mask", ylim=(None, 1.01))
    axes.set_title("Is the ticket stable?", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    one_legend(figure, [axes], columns=2)
    picture = Picture(
        "iou",
        "IoU of consecutive candidate masks during discovery.",
        "Stability of the ticket during discovery.",
    )
    return save(figure, folder, picture)


def _pretraining(folder: Path, results: Sequence[Result]) -> Picture | None:
    found = _pretrained(results, "curve")
    if not found:
        return None
    figure, ((left, right),) = panels(1, 2, (10.5, 4.6))
    largest = max(r.values["curve"][-1][0] for r in found)
    scale, unit = (1e9, "billion") if largest >= 1e9 else (1e6, "million")
    base = next((np.array(r.values["curve"]) for r in found if r.arm == BASE), None)
    for i, result in enumerate(found):
        curve = np.array(result.values["curve"], dtype=float)  # (points, 2): tokens, loss
        label = f"{_label(result, found)}: {result.values['val_loss']:.4f} at the end"
        style = _style(i, len(curve), 12, label)
        left.plot(curve[:, 0] / scale, curve[:, 1], **style)
        if base is not None:
            beyond = curve[:, 1] - np.interp(curve[:, 0], base[:, 0], base[:, 1])
            right.plot(curve[:, 0] / scale, beyond, **style)
    left.set(xlabel=f"tokens ({unit})", ylabel="validation loss (nats per token)")
    right.set(xlabel=f"tokens ({unit})", ylabel="loss beyond base's (nats per token)")
    left.grid(linewidth=0.3)
    right.grid(linewidth=0.3)
    if base is None:
        right.remove()
    one_legend(figure, [left])
    picture = Picture(
        "pretraining",
        "Validation loss against tokens for each arm, and its distance to BASE's.",
        "Pretraining of every arm: the loss, and what it is above BASE's at the same tokens.",
    )
    return save(figure, folder, picture, "Pretraining")
