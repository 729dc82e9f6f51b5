"""The figures are drawn and fit."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest

from pmp_ds.study.figures import one_legend
from pmp_ds.study.sweep_figures import _density_arms
from tests.helpers.study import pretrain


@pytest.mark.parametrize("count", [1, 6])
def test_a_legend_of_long_names_stays_inside_the_figure(count: int):
    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for i in range(count):
        axes.plot([0, 1], [0, i], label=f"early-bird ticket of the arm {i}, untrained head")
    one_legend(figure, [axes])
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert len(figure.legends) == 1
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    plt.close(figure)


def test_density_is_all_that_may_differ_from_pmp():
    quota = pretrain("pmp-quota", loss=3.0)
    arms = _density_arms(
        [
            pretrain("base", loss=2.9, source="none"),
            pretrain("pmp", loss=3.0),
            pretrain("pmp", loss=3.0, seed=1),
            pretrain("pmp-0.5", loss=3.1, density=0.5),
            pretrain("pmp-gradient", loss=3.1, score="gradient"),
            replace(quota, settings={**quota.settings, "quota": "per_tensor"}),
        ]
    )
    assert arms == {"base": 1.0, "pmp": 0.7, "pmp-0.5": 0.5}
