"""Drawing for a study: colours, saving, and points with intervals."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pmp_ds.errors import shown
from pmp_ds.study.runs import AVERAGE, is_lm, ordered
from pmp_ds.study.statistics import Estimate

COLOURS = ("#2a6fbb", "#d9822b", "#3a923a", "#8e5ea2", "#7f6a5f", "#c0392b", "#17a2b8", "#555555")
"""For any series in order; of one brightness, so that grey prints tell them by marker."""
MARKERS = "osD^vPX*"
GREY = "#888888"
INTERVALS = "Bars are 95% intervals over runs; a point without one is a single run."
LABELS = {AVERAGE: "Average"}


@dataclass(frozen=True)
class Picture:
    """A file of figures/ and its texts."""

    name: str
    alt: str
    """What a reader who cannot see it should know."""
    caption: str


def save(figure: Figure, folder: Path, picture: Picture) -> Picture:
    """figures/NAME.png and .svg; the same input gives the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": picture.name}):  # else ids in an SVG are random
        figure.savefig(folder / f"{picture.name}.png", dpi=130)
        figure.savefig(folder / f"{picture.name}.svg", metadata={"Date": None})
    plt.close(figure)
    return picture


def short(label: str, most: int = 28) -> str:
    """A name for a picture: cut in the middle where it is long, and never a formula."""
    label, half = re.sub(r"(?<!\\)\$", r"\\$", shown(label)), (most - 3) // 2
    return label if len(label) <= most else f"{label[:half]}...{label[-half:]}"


def error(estimate: Estimate, factor: float) -> tuple[float, float, float]:
    """Place and the two arms of its interval."""
    mean = estimate.mean * factor
    if estimate.low is None or estimate.high is None:
        return mean, 0.0, 0.0
    return mean, mean - estimate.low * factor, estimate.high * factor - mean


def dots(
    axes: Axes,
    series: Mapping[str, Mapping[str, Estimate]],
    columns: Sequence[str],
    *,
    factor: float = 100.0,
) -> None:
    """One group of points per column, one colour per series, intervals as bars."""
    width = 0.7 / max(1, len(series))
    for i, (name, found) in enumerate(series.items()):
        own = [c for c in columns if c in found]
        if not own:
            continue
        places = [columns.index(c) + (i - (len(series) - 1) / 2) * width for c in own]
        values = [error(found[c], factor) for c in own]
        axes.errorbar(
            places,
            [v[0] for v in values],
            yerr=list(zip(*(v[1:] for v in values), strict=True)),
            fmt=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            markersize=4.5,
            capsize=2,
            elinewidth=1.2,
            label=name,
        )
    many = len(columns) > 4
    axes.set_xticks(
        range(len(columns)),
        [LABELS.get(c, short(c)) for c in columns],
        rotation=40 if many else 0,
        ha="right" if many else "center",
        rotation_mode="anchor",
        fontsize=9,
    )
    axes.set_xlim(-0.6, len(columns) - 0.4)
    for i in range(1, len(columns)):
        axes.axvline(i - 0.5, color=GREY, linewidth=0.3)
    axes.grid(axis="y", linewidth=0.3)


def by_column(
    series: Mapping[str, Mapping[str, Estimate]],
    title: str,
    majority: Mapping[str, float] | None = None,
) -> Figure | None:
    """GLUE accuracies on the left, LM losses on the right; None without any."""
    columns = ordered({c for found in series.values() for c in found})
    glue, lm = [c for c in columns if not is_lm(c)], [c for c in columns if is_lm(c)]
    panels = [part for part in (glue, lm) if part]
    if not panels:
        return None
    widths = [max(2.6, 0.95 * len(part)) for part in panels]
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(max(6.4, sum(widths) + 1), 4.6),
        layout="constrained",
        gridspec_kw={"width_ratios": widths},
        squeeze=False,
    )
    for axes, part in zip(grid[0], panels, strict=True):
        dots(axes, series, part, factor=100.0 if part is glue else 1.0)
        axes.set_ylabel(
            "accuracy (%), higher is better"
            if part is glue
            else "loss (nats per token), lower is better"
        )
        if part is glue and majority:
            _majority(axes, majority, part)
    one_legend(figure, grid[0])
    figure.suptitle(title, fontsize=11)
    return figure


def one_legend(figure: Figure, panels: Iterable[Axes], columns: int = 3) -> None:
    """Below all panels, so that long names never cover a curve; in fewer columns where they would
    not fit beside each other."""
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
    for i, column in enumerate(columns):
        if column in majority:
            axes.hlines(
                100 * majority[column],
                i - 0.42,
                i + 0.42,
                color="black",
                linestyle=":",
                linewidth=1.2,
                label="majority class",
            )
