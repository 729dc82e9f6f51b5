"""The choice of settings is the same for both sides."""

import pytest
import scipy.stats

from pmp_ds.finetune.method import METHODS, RECOVERED
from pmp_ds.results import Result
from pmp_ds.study.attacker import crossing
from pmp_ds.study.choice import best, with_average
from pmp_ds.study.headline import contrast, gap, headline, secret
from pmp_ds.study.runs import AVERAGE, fine_tunes, pick
from tests.helpers.study import fine_tune, pretrain


def sweep(arm: str, by_lr: dict[float, float], seeds: int = 2, **settings: object) -> list[Result]:
    return [
        fine_tune(arm, "sst2", "full", score=score + seed / 1000, lr=lr, seed=seed, **settings)  # type: ignore[arg-type]
        for lr, score in by_lr.items()
        for seed in range(seeds)
    ]


def test_each_side_takes_its_best_of_the_shared_settings():
    runs = fine_tunes(sweep("base", {1e-5: 0.8, 1e-4: 0.7}) + sweep("pmp", {1e-5: 0.5, 1e-4: 0.6}))
    found = gap(runs)
    assert abs(found.estimates["SST-2"].mean - 20.0) < 1e-9
    chosen = found.chosen["sst2"]
    assert [run.setting("lr") for run in chosen] == [1e-5, 1e-4]


def test_a_setting_that_one_side_lacks_does_not_count():
    runs = fine_tunes(sweep("base", {1e-5: 0.8, 1e-3: 0.9}) + sweep("pmp", {1e-5: 0.5, 1e-4: 0.6}))
    assert abs(gap(runs).estimates["SST-2"].mean - 30.0) < 1e-9


def test_a_cell_without_all_its_seeds_does_not_count():
    lucky = sweep("pmp", {1e-4: 0.9}, seeds=1)
    runs = fine_tunes(sweep("base", {1e-5: 0.8, 1e-4: 0.7}) + sweep("pmp", {1e-5: 0.5}) + lucky)
    assert abs(gap(runs).estimates["SST-2"].mean - 30.0) < 1e-9


def test_nothing_shared_is_not_compared():
    found = gap(fine_tunes(sweep("base", {1e-5: 0.8}) + sweep("pmp", {1e-4: 0.6})))
    assert (found.estimates, found.chosen) == ({}, {})


def test_loss_is_turned():
    runs = fine_tunes(
        [
            fine_tune(arm, "lm", "full", score=loss, seed=seed)
            for arm, loss in (("base", 2.0), ("pmp", 2.25))
            for seed in range(2)
        ]
    )
    assert gap(runs).estimates["LM"].mean == 0.25


def test_a_recovered_mask_is_not_the_authorized_one():
    runs = fine_tunes(
        [
            fine_tune("pmp", "sst2", "ticket", score=0.9, mask="own"),
            fine_tune("pmp", "sst2", "ticket", score=0.7, mask="shadow model"),
        ]
    )
    assert [run.score("SST-2") for run in pick(runs, methods=[METHODS["ticket"]])] == [0.9]
    assert [run.score("SST-2") for run in pick(runs, methods=[RECOVERED])] == [0.7]


def test_lora_ranks_are_settings_of_their_own():
    runs = fine_tunes(
        [
            fine_tune("pmp", "sst2", "lora", score=score, lora={"rank": rank, "targets": ["q"]})
            for rank, score in ((4, 0.6), (8, 0.7))
        ]
    )
    assert len(best(runs)) == 1
    assert best(runs)[0].setting("lora.rank") == 8


def of_models(arm: str, method: str, scores: dict[str, float]) -> list[Result]:
    """Three fine-tuning seeds of each model, 0.01 apart."""
    return [
        Result(
            **vars(fine_tune(arm, "sst2", method, score=score + (seed - 1) / 100, seed=seed))
            | {"model_digest": model}
        )
        for model, score in scores.items()
        for seed in range(3)
    ]


def test_between_arms_the_models_are_the_units():
    """Six runs of two models are two draws."""
    runs = fine_tunes(
        [
            *of_models("base", "full", {"b": 0.6, "b2": 0.7}),
            *of_models("pmp", "full", {"p": 0.5, "p2": 0.56}),
        ]
    )
    found = gap(runs).estimates["SST-2"]
    assert (found.n, found.paired) == (2, False)
    assert found.mean == pytest.approx(12.0)
    expected = scipy.stats.ttest_ind([60.0, 70.0], [50.0, 56.0], equal_var=False)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_two_methods_on_the_same_models_are_paired_run_by_run():
    runs = fine_tunes(
        [
            *of_models("pmp", "ticket", {"p": 0.5, "p2": 0.6}),
            *of_models("pmp", "random", {"p": 0.45, "p2": 0.58}),
        ]
    )
    found = secret(runs).estimates["SST-2"]
    assert (found.n, found.paired) == (6, True)
    assert found.mean == pytest.approx(3.5)


def test_a_model_that_one_method_lacks_is_left_out_of_the_pairs():
    runs = fine_tunes(
        [
            *of_models("pmp", "ticket", {"p": 0.5}),
            *of_models("pmp", "random", {"p": 0.45, "p2": 0.58}),
        ]
    )
    found = secret(runs).estimates["SST-2"]
    assert (found.n, found.paired) == (3, True)
    assert found.mean == pytest.approx(5.0)


def test_average_is_over_complete_seeds_and_leaves_losses_out():
    found = with_average(
        {"CoLA": {("", 0): 0.5, ("", 1): 0.7}, "RTE": {("", 0): 0.7}, "LM": {("", 0): -3.0}}
    )
    assert found[AVERAGE] == {("", 0): 0.6}


def test_text_of_pretraining_is_a_column_of_its_own():
    runs = fine_tunes(
        [
            pretrain("pmp", loss=3.0),
            fine_tune("pmp", "lm", "full", score=2.0),
            fine_tune("pmp", "lm", "full", score=2.9, data="data of pretraining"),
        ]
    )
    assert [run.task for run in runs] == ["LM", "LM pretraining"]


def test_methods_of_the_paired_contrast_share_their_settings():
    """The true mask may not use a learning rate that the random one did not have."""
    runs = fine_tunes(
        [
            fine_tune("pmp", "sst2", method, score=score, lr=lr, seed=seed)
            for method, lr, score in (
                ("ticket", 1e-4, 0.7),
                ("ticket", 1e-3, 0.9),
                ("random", 1e-4, 0.6),
            )
            for seed in range(2)
        ]
    )
    found = headline([], runs, {})
    assert abs(found.secret.estimates["SST-2"].mean - 10.0) < 1e-9


def test_crossing():
    curve = [(0.0, 4.0), (100.0, 3.0), (200.0, 2.0)]
    assert crossing(curve, 2.5, lower=True) == 150.0
    assert crossing(curve, 4.5, lower=True) == 0.0
    assert crossing(curve, 1.0, lower=True) == float("inf")
    assert crossing([(0.0, 0.5), (10.0, 0.7)], 0.6, lower=False) == 5.0


def test_contrast_of_nothing():
    assert contrast([], []).estimates == {}


def test_epochs_are_no_setting_where_updates_are_counted():
    runs = fine_tunes(
        [
            fine_tune("pmp", "lm", "full", score=3.0, epochs=3, steps=40),
            fine_tune("pmp", "sst2", "full", score=0.8, epochs=3),
        ]
    )
    assert [run.setting("epochs") for run in runs] == [None, 3]
