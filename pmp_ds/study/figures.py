"""Drawing for a study: colours, saving, and points with intervals."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pmp_ds.errors import shown
from pmp_ds.study.runs import is_lm, ordered
from pmp_ds.study.statistics import Estimate

COLOURS = ("#2a6fbb", "#d9822b", "#3a923a", "#8e5ea2", "#7f6a5f", "#c0392b", "#17a2b8", "#555555")
"""For any series in order; of one brightness, so that grey prints tell them by marker."""
MARKERS = "osD^vPX*"
GREY = "#888888"
INTERVALS = "Bars are 95% intervals over runs; a point without one is a single run."


@dataclass(frozen=True)
class Picture:
    """A file of figures/ and its texts."""

    name: str
    alt: str
    """What a reader who cannot see it should know."""
    caption: str


def panels(rows: int, columns: int, size: tuple[float, float], **settings: Any) -> tuple[Any, Any]:
    """Return a figure and its axes, (rows, columns)."""
    return plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **settings
    )


def save(figure: Figure, folder: Path, picture: Picture, title: str = "") -> Picture:
    """Write figures/NAME.png and .svg; the same input gives the same bytes."""
    if title:
        figure.suptitle(title, fontsize=11)
    with matplotlib.rc_context({"svg.hashsalt": picture.name}):  # else ids in an SVG are random
        figure.savefig(folder / f"{picture.name}.png", dpi=130)
        figure.savefig(folder / f"{picture.name}.svg", metadata={"Date": None})
    plt.close(figure)
    return picture


def short(label: str, most: int = 28) -> str:
    """Return a name for a picture: cut in the middle where it is long, and never a formula."""
    label, half = re.sub(r"(?<!\\)\$", r"\\$", shown(label)), (most - 3) // 2
    return label if len(label) <= most else f"{label[:half]}...{label[-half:]}"


def look(i: int) -> dict[str, Any]:
    """Return the colour and marker of a series."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def not_run(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color="#555555")


def intervals(
    axes: Axes,
    i: int,
    label: str,
    points: Iterable[tuple[float, Estimate]],
    *,
    factor: float = 1.0,
    line: str = "none",
    across: bool = False,
) -> None:
    """Draw a series of estimates at places, their intervals as bars; ``across`` from left to
    right."""
    rows = [(place, e.mean, *(e.interval or (e.mean, e.mean))) for place, e in points]
    if not rows:
        return
    places, *ends = np.array(rows).T
    means, lows, highs = (factor * end for end in ends)
    x, y = (means, places) if across else (places, means)
    bars = [means - lows, highs - means]
    axes.errorbar(
        x,
        y,
        **look(i),
        xerr=bars if across else None,
        yerr=None if across else bars,
        linestyle=line,
        linewidth=1.2,
        markersize=4.5,
        capsize=2,
        label=label,
    )


def by_kind(columns: Iterable[str]) -> list[list[str]]:
    """Return GLUE's columns and those of losses, each in order, without an empty list."""
    parts = [[c for c in ordered(columns) if is_lm(c) == lm] for lm in (False, True)]
    return [part for part in parts if part]


def by_column(
    series: Mapping[str, Mapping[str, Estimate]], majority: Mapping[str, float]
) -> Figure | None:
    """Draw GLUE accuracies on the left, LM losses on the right; None without any."""
    parts = by_kind({c for found in series.values() for c in found})
    if not parts:
        return None
    widths = [max(2.6, 0.95 * len(part)) for part in parts]
    size = max(6.4, sum(widths) + 1), 4.6
    figure, grid = panels(1, len(parts), size, gridspec_kw={"width_ratios": widths})
    for axes, part in zip(grid[0], parts, strict=True):
        lm = is_lm(part[0])
        _dots(axes, series, part, factor=1.0 if lm else 100.0)
        axes.set_ylabel(
            "loss (nats per token), lower is better" if lm else "accuracy (%), higher is better"
        )
        if not lm:
            _majority(axes, majority, part)
    one_legend(figure, grid[0])
    return figure


def _dots(
    axes: Axes,
    series: Mapping[str, Mapping[str, Estimate]],
    columns: Sequence[str],
    *,
    factor: float,
) -> None:
    """One group of points per column, one colour per series."""
    width = 0.7 / max(1, len(series))
    for i, (name, found) in enumerate(series.items()):
        aside = (i - (len(series) - 1) / 2) * width
        points = [(at + aside, found[c]) for at, c in enumerate(columns) if c in found]
        intervals(axes, i, name, points, factor=factor)
    many = len(columns) > 4
    axes.set_xticks(
        range(len(columns)),
        [short(c) for c in columns],
        rotation=40 if many else 0,
        ha="right" if many else "center",
        rotation_mode="anchor",
        fontsize=9,
    )
    axes.set_xlim(-0.6, len(columns) - 0.4)
    for i in range(1, len(columns)):
        axes.axvline(i - 0.5, color=GREY, linewidth=0.3)
    axes.grid(axis="y", linewidth=0.3)


def one_legend(figure: Figure, panels: Iterable[Axes], columns: int = 3) -> None:
    """Put it below all panels, so that long names never cover a curve; in fewer columns where they
    would not fit beside each other."""
    known: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    names = [short(name, 60 // columns + 24) for name in known]
    for ncols in range(min(columns, len(known)), 0, -1):
        legend = figure.legend(
            known.values(),
            names,
            loc="outside lower center",
            ncols=ncols,
            frameon=False,
            fontsize=9,
        )
        if ncols == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()


def _majority(axes: Axes, majority: Mapping[str, float], columns: Sequence[str]) -> None:
    style: dict[str, Any] = {
        "color": "black",
        "linestyle": ":",
        "linewidth": 1.2,
        "label": "majority class",
    }
    for i, column in enumerate(columns):
        if column in majority:
            axes.hlines(100 * majority[column], i - 0.42, i + 0.42, **style)
