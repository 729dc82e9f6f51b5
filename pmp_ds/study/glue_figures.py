"""Pictures of fine-tuning scores: the gaps, Figure 2 and Figure 3 of the paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from pmp_ds.finetune.method import UNAUTHORIZED
from pmp_ds.results import Result
from pmp_ds.study import sweep_figures
from pmp_ds.study.figures import (
    COLOURS,
    INTERVALS,
    LABELS,
    MARKERS,
    Picture,
    by_column,
    error,
    one_legend,
    save,
)
from pmp_ds.study.glue_tables import HEADS, METHODS, Levels, fine_tuned, heads, majority
from pmp_ds.study.headline import Headline
from pmp_ds.study.runs import BASE, PMP, RANDOM, FineTune, is_lm, ordered, pick
from pmp_ds.study.six_tables import NAMES
from pmp_ds.study.statistics import Estimate


def draw(
    folder: Path, results: Sequence[Result], runs: Sequence[FineTune], six: Headline
) -> dict[str, Picture]:
    """Every picture that the results allow, by name."""
    made = (
        _gaps(folder, six),
        _authorized(folder, results, runs),
        _before(folder, results),
        _after(folder, results, runs),
        sweep_figures.draw(folder, results, runs),
    )
    return {picture.name: picture for picture in made if picture is not None}


def _gaps(folder: Path, six: Headline) -> Picture | None:
    """(i) to (iii) for each column, against 0."""
    contrasts = {
        f"{roman} {words.split(':')[0]}": getattr(six, name).estimates
        for name, (roman, words) in NAMES.items()
    }
    contrasts = {name: found for name, found in contrasts.items() if found}
    columns = ordered({c for found in contrasts.values() for c in found})
    panels = [[c for c in columns if is_lm(c) == lm] for lm in (False, True)]
    panels = [part for part in panels if part]
    if not panels:
        return None
    heights = [0.5 + 0.42 * len(part) for part in panels]
    figure, grid = plt.subplots(
        len(panels),
        1,
        figsize=(7.6, sum(heights) + 1.6),
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
    )
    for axes, part in zip(grid[:, 0], panels, strict=True):
        _forest(axes, contrasts, part)
        axes.set_xlabel(
            "difference (nats per token)"
            if is_lm(part[0])
            else "difference (percentage points of accuracy)"
        )
    one_legend(figure, grid[:, 0], columns=1)
    figure.suptitle("What the mask changes: right of 0 is what its owner wants", fontsize=11)
    return save(
        figure,
        folder,
        Picture(
            "gaps",
            "Differences (i) to (iii) with intervals for each column, beside a line at 0.",
            f"The gaps by column. {INTERVALS}",
        ),
    )


def _forest(
    axes: Axes, contrasts: Mapping[str, Mapping[str, Estimate]], columns: Sequence[str]
) -> None:
    for i, (name, found) in enumerate(contrasts.items()):
        shown = [c for c in columns if c in found]
        values = [error(found[c], 1.0) for c in shown]
        axes.errorbar(
            [v[0] for v in values],
            [columns.index(c) + (i - 1) * 0.22 for c in shown],
            xerr=list(zip(*(v[1:] for v in values), strict=True)) or None,
            fmt=MARKERS[i],
            color=COLOURS[i],
            markersize=4.5,
            capsize=2,
            elinewidth=1.2,
            label=name,
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(columns)), [LABELS.get(c, c) for c in columns])
    axes.set_ylim(len(columns) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.3)


def _authorized(
    folder: Path, results: Sequence[Result], runs: Sequence[FineTune]
) -> Picture | None:
    series = {
        words: fine_tuned(runs, PMP, (method,))
        for method, words in METHODS.items()
        if pick(runs, arm=PMP, methods=(method,))
    }
    figure = by_column(series, "Figure 3. Fine-tuning the PMP model", majority(results))
    if figure is None:
        return None
    return save(
        figure,
        folder,
        Picture(
            "figure3",
            "Scores of the PMP model by fine-tuning method and column.",
            f"Figure 3. Authorized against unauthorized fine-tuning of the PMP model. {INTERVALS}",
        ),
    )


EARLY_BIRD = {BASE: "no mask", PMP: "early-bird ticket", RANDOM: "random mask"}


def _before(folder: Path, results: Sequence[Result]) -> Picture | None:
    series = {
        f"{words}, {head.lower()}": found
        for kind, head in HEADS.items()
        for arm, words in EARLY_BIRD.items()
        if (found := heads(results, arm, kind))
    }
    title = "Figure 2a. Before fine-tuning: early-bird ticket or random mask"
    return _earlybird(folder, "figure2a", title, series, results)


def _after(folder: Path, results: Sequence[Result], runs: Sequence[FineTune]) -> Picture | None:
    series = {
        words: found
        for arm, words in EARLY_BIRD.items()
        if (found := fine_tuned(runs, arm, UNAUTHORIZED))
    }
    title = "Figure 2b. Best unauthorized fine-tuning: early-bird ticket or random mask"
    return _earlybird(folder, "figure2b", title, series, results)


def _earlybird(
    folder: Path, name: str, title: str, series: Mapping[str, Levels], results: Sequence[Result]
) -> Picture | None:
    if not any(words.startswith(EARLY_BIRD[RANDOM]) for words in series):
        return None
    figure = by_column(series, title, majority(results))
    if figure is None:
        return None
    return save(
        figure,
        folder,
        Picture(name, f"{title}: scores of the three models by column.", f"{title}. {INTERVALS}"),
    )
