"""Pictures of fine-tuning scores: the gaps, Figure 2 and Figure 3 of the paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pmp_ds.finetune.method import Role, reported
from pmp_ds.results import Result
from pmp_ds.study import sweep_figures
from pmp_ds.study.figures import (
    INTERVALS,
    Picture,
    by_column,
    by_kind,
    intervals,
    one_legend,
    panels,
    save,
)
from pmp_ds.study.glue_tables import HEADS, Levels, fine_tuned, heads, majority
from pmp_ds.study.headline import Headline
from pmp_ds.study.runs import BASE, PMP, RANDOM, FineTune, is_lm


def draw(
    folder: Path, results: Sequence[Result], runs: Sequence[FineTune], six: Headline
) -> dict[str, Picture]:
    """Draw every picture that the results allow; returns them by name."""
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
    contrasts = {name: found for name, found in six.by_column.items() if found}
    parts = by_kind({c for found in contrasts.values() for c in found})
    if not parts:
        return None
    heights = [0.5 + 0.42 * len(part) for part in parts]
    size = 7.6, sum(heights) + 1.6
    figure, grid = panels(len(parts), 1, size, gridspec_kw={"height_ratios": heights})
    for axes, part in zip(grid[:, 0], parts, strict=True):
        for i, (name, found) in enumerate(contrasts.items()):
            points = [(at + (i - 1) * 0.22, found[c]) for at, c in enumerate(part) if c in found]
            intervals(axes, i, name, points, across=True)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(part)), part)
        axes.set_ylim(len(part) - 0.5, -0.5)
        axes.grid(axis="x", linewidth=0.3)
        unit = "nats per token" if is_lm(part[0]) else "percentage points of accuracy"
        axes.set_xlabel(f"difference ({unit})")
    one_legend(figure, grid[:, 0], columns=1)
    picture = Picture(
        "gaps",
        "Differences (i) to (iii) with intervals for each column, beside a line at 0.",
        f"The gaps by column. {INTERVALS}",
    )
    title = "What the mask changes: right of 0 is what its owner wants"
    return save(figure, folder, picture, title)


def _authorized(
    folder: Path, results: Sequence[Result], runs: Sequence[FineTune]
) -> Picture | None:
    series = {method.title: fine_tuned(runs, PMP, [method]) for method in reported()}
    picture = Picture(
        "figure3",
        "Scores of the PMP model by fine-tuning method and column.",
        f"Figure 3. Authorized against unauthorized fine-tuning of the PMP model. {INTERVALS}",
    )
    return _by_column(folder, picture, "Figure 3. Fine-tuning the PMP model", series, results)


EARLY_BIRD = {BASE: "no mask", PMP: "early-bird ticket", RANDOM: "random mask"}


def _before(folder: Path, results: Sequence[Result]) -> Picture | None:
    series = {
        f"{words}, {head.lower()}": heads(results, arm, kind)
        for kind, head in HEADS.items()
        for arm, words in EARLY_BIRD.items()
    }
    title = "Figure 2a. Before fine-tuning: early-bird ticket or random mask"
    return _early_bird(folder, "figure2a", title, series, results)


def _after(folder: Path, results: Sequence[Result], runs: Sequence[FineTune]) -> Picture | None:
    attacks = reported(Role.ATTACK)
    series = {words: fine_tuned(runs, arm, attacks) for arm, words in EARLY_BIRD.items()}
    title = "Figure 2b. Best unauthorized fine-tuning: early-bird ticket or random mask"
    return _early_bird(folder, "figure2b", title, series, results)


def _early_bird(
    folder: Path, name: str, title: str, series: Mapping[str, Levels], results: Sequence[Result]
) -> Picture | None:
    if not any(found for words, found in series.items() if words.startswith(EARLY_BIRD[RANDOM])):
        return None
    alt = f"{title}: scores of the three models by column."
    picture = Picture(name, alt, f"{title}. {INTERVALS}")
    return _by_column(folder, picture, title, series, results)


def _by_column(
    folder: Path,
    picture: Picture,
    title: str,
    series: Mapping[str, Levels],
    results: Sequence[Result],
) -> Picture | None:
    measured = {name: found for name, found in series.items() if found}
    figure = by_column(measured, majority(results))
    return None if figure is None else save(figure, folder, picture, title)
