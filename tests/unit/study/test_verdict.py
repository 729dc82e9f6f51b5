"""Planted effects are found; where none is planted, the report says so."""

import pytest

from pmp_ds.results import Result
from pmp_ds.study.controls import controls, edges
from pmp_ds.study.headline import Headline, headline
from pmp_ds.study.runs import AVERAGE, fine_tunes
from pmp_ds.study.six_tables import table_six
from pmp_ds.study.verdict import verdict
from tests.helpers import study


def six(results: list[Result]) -> Headline:
    return headline(results, fine_tunes(results), {})


def test_intervals_cover_what_was_planted():
    """Of 20 studies with 6 intervals each, about 6 of 120 miss."""
    missed = 0
    for luck in range(20):
        found = six(
            study.study(
                gap=5.0,
                secret=2.0,
                tax=0.0,
                seeds=4,
                tasks=("sst2", "rte", "lm"),
                lrs=(1e-4, 1e-3),
                luck=luck,
            )
        )
        for contrast, planted in ((found.gap, 5.0), (found.authorized, 1.0), (found.secret, 2.0)):
            for column, unit in ((AVERAGE, 1.0), ("LM", 0.01)):
                estimate = contrast.estimates[column]
                assert abs(estimate.mean - planted * unit) < 0.8 * unit
                assert estimate.interval is not None
                low, high = estimate.interval
                missed += not low < planted * unit < high
    assert 1 <= missed <= 14


def test_planted_effects_are_found():
    found = six(study.study(gap=5.0, secret=2.0, tax=0.01, seeds=4, luck=1))
    assert found.capability is not None
    assert found.capability.mean == pytest.approx(-0.01)
    sentences = verdict(found)
    assert sentences[0].startswith("GLUE: measurable protection. ")
    assert "The base is matched" in sentences[0]
    assert any(s.startswith("GLUE: the true mask is worth +") for s in sentences)


def test_no_effect_is_no_measurable_protection():
    sentences = verdict(six(study.study(gap=0.0, secret=0.0, tax=0.0, seeds=4, luck=2)))
    assert sentences[0].startswith("GLUE: no measurable protection. ")
    assert "includes 0" in sentences[0]
    assert sentences[1].startswith("Language modelling: no measurable protection. ")
    assert sentences[2].startswith("GLUE: knowing the mask is worth nothing measurable.")


def test_a_weaker_base_is_no_protection():
    sentences = verdict(six(study.study(gap=5.0, secret=2.0, tax=0.1)))
    assert sentences[0].startswith("GLUE: a gap, but not at matched base loss: ")
    assert "minus BASE's is +0.1000 nats per token" in sentences[0]


@pytest.mark.parametrize(
    ("loss", "gap", "expected"),
    [
        (3.11, 5.0, "measurable protection"),
        (3.11, 0.0, "no measurable protection"),
        (3.11, -5.0, "no protection"),
        (3.2, 5.0, None),
    ],
)
def test_a_base_that_was_stopped_where_pmp_is(loss: float, gap: float, expected: str | None):
    whole = study.study(gap=gap, secret=2.0, tax=0.1, seeds=4, luck=2)
    early = [
        Result(**vars(r) | {"arm": "early", "model_digest": "early"})
        for r in whole
        if r.arm == "base" and r.kind == "finetune"
    ]
    early.append(study.pretrain("early", loss=loss, source="none", tokens=1_000_000))
    found = six([*whole, *early])
    sentences = [s for s in verdict(found) if "against early" in s]
    rows = [row for row in table_six(found).rows if "best early" in row[1]]
    if expected is None:
        assert (sentences, rows) == ([], [])
    else:
        assert f"GLUE, against early, trained to PMP's loss: {expected}. " in sentences[0]
        assert len(rows) == len(sentences) == 2


def test_the_opposite_of_protection():
    sentences = verdict(six(study.study(gap=-5.0, secret=-2.0, tax=0.0)))
    assert sentences[0].startswith("GLUE: no protection. The PMP model fine-tunes better")
    assert "GLUE: a random mask fine-tunes better than the true one" in " ".join(sentences)


def test_one_seed_gives_no_verdict():
    sentences = verdict(six(study.study(gap=5.0, secret=2.0, tax=0.0, seeds=1, tasks=("sst2",))))
    assert sentences[0].startswith("SST-2: no verdict from one seed")
    assert "(one seed)" in sentences[0]


def test_nothing_measured():
    assert verdict(six([])) == [
        "No verdict: (i) needs fine-tunes of the arms base and pmp with a common setting."
    ]
    assert "not measured" in table_six(six([])).markdown()


def test_leaks_are_in_the_verdict():
    results = study.study(gap=0.0, secret=0.0, tax=0.0, seeds=2, tasks=("sst2",))
    audit = study.audit() | {"leaks": ["seed replay"]}
    found = headline(results, fine_tunes(results), {"audit.json": audit})
    assert verdict(found)[-1] == "The mask leaks (audit.json): seed replay."


def test_attackers_tokens():
    """PMP's curve is BASE's, reached after twice the tokens; one task never gets there."""

    def curve(scale: float, end: float) -> list[list[float]]:
        return [[0, 4.0], [100 * scale, end + 0.5], [200 * scale, end]]

    results = []
    for seed in range(3):
        for arm, scale in (("base", 1.0), ("pmp", 2.0)):
            result = study.fine_tune(arm, "lm", "full", score=2.0, seed=seed)
            results.append(
                Result(**vars(result) | {"values": result.values | {"curve": curve(scale, 2.0)}})
            )
    tokens = six(results).tokens["LM"]
    assert tokens.more is not None
    assert (tokens.pairs, tokens.never, tokens.most) == (3, 0, 400)
    assert tokens.more.mean == pytest.approx(0.6931, abs=1e-4)
    assert "+100% tokens; reached in 3 of 3" in table_six(six(results)).markdown()

    worse = [
        study.fine_tune("base", "lm", "full", score=2.0),
        study.fine_tune("pmp", "lm", "full", score=2.4),
    ]
    tokens = six(worse).tokens["LM"]
    assert (tokens.more, tokens.never) == (None, 1)
    assert "reached in 0 of 1" in table_six(six(worse)).markdown()


def test_controls_that_are_absent_say_so():
    results = study.study(gap=0.0, secret=0.0, tax=0.0, seeds=1, tasks=("sst2",), lrs=(1e-4,))
    found = {c.name: c for c in controls(results, fine_tunes(results))}
    absent = {name for name, control in found.items() if not control.run}
    assert absent == {
        "Complement only, fine-tuned on PMP",
        "Mask recovered by an attack, fine-tuned on PMP",
        "Learning rates from 1e-5 to 3e-3",
        "Longer fine-tuning",
        "Continued full pretraining of the release",
        "Densities 0.5 to 1.0",
        "Ticket from each score",
        "Several fine-tuning seeds",
        "Several pretraining seeds",
    }
    assert found["Ticket from each score"].found == "not run: ema, gradient"
    assert not any(control.run for control in controls([], []))


def test_controls_that_are_there():
    results = study.study(gap=0.0, secret=0.0, tax=0.0, seeds=5, tasks=("qnli",)) + study.sweeps()
    results += [
        study.fine_tune("pmp", "lm", "full", score=3.0, data="data of pretraining"),
        study.fine_tune("pmp", "qnli", "complement", score=0.5),
    ]
    found = {c.name: c for c in controls(results, fine_tunes(results))}
    absent = {name for name, control in found.items() if not control.run}
    assert absent == {"Mask recovered by an attack, fine-tuned on PMP", "Several pretraining seeds"}
    assert found["Learning rates from 1e-5 to 3e-3"].found.startswith("4 from 1e-05 to 0.003")


def test_unequal_budget_is_no_control():
    results = [
        study.pretrain("base", loss=3.0, source="none", tokens=1000),
        study.pretrain("pmp", loss=3.0, tokens=2000),
    ]
    budget = controls(results, [])[0]
    assert budget.found == "not run: BASE had 1,000 tokens, PMP 2,000"


def test_best_learning_rate_at_the_edge_is_told():
    runs = fine_tunes(
        [
            study.fine_tune("base", "sst2", "full", score=score, lr=lr)
            for lr, score in ((1e-5, 0.6), (1e-4, 0.7), (1e-3, 0.8))
        ]
    )
    assert edges(runs) == ["base, sst2, full: 0.001"]
