"""A method of fine-tuning that is added to METHODS alone is in all of a report that concerns it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pmp_ds.finetune.method import METHODS, Method, Role, reported
from pmp_ds.results import Result
from pmp_ds.study.controls import controls, edges
from pmp_ds.study.figures import Picture
from pmp_ds.study.glue_figures import draw
from pmp_ds.study.glue_tables import table_canonical, table_methods, table_one
from pmp_ds.study.headline import authorized, gap, headline, secret
from pmp_ds.study.plan import steps
from pmp_ds.study.recipe import Arm, Study, Tuning
from pmp_ds.study.runs import fine_tunes
from pmp_ds.study.tables import Table
from tests.helpers.study import fine_tune


@pytest.fixture
def added(request: pytest.FixtureRequest) -> Iterator[Method]:
    """One more method, of the role that the test asks for."""
    facts = {"norms": lambda config: config.density}
    method = Method(name="norms", title="Norms alone", role=request.param, facts=facts)
    with mock.patch.dict(METHODS, {"norms": method}):
        yield method


def with_role(role: Role) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("added", [role], indirect=True, ids=[role.name])


def measured(norms: float, *, lr: float = 1e-4) -> list[Result]:
    """BASE and PMP with the shipped methods, PMP at 0.6; with the added one at ``norms``."""
    at: dict[str, dict[str, float]] = {
        "base": {"full": 0.7, "ticket": 0.7, "random": 0.7, "norms": norms},
        "pmp": {"full": 0.6, "ticket": 0.6, "random": 0.6, "norms": norms},
    }
    return [
        fine_tune(arm, "sst2", method, score=score, seed=seed, lr=lr, **OWN.get(method, {}))
        for seed in range(2)
        for arm, scores in at.items()
        for method, score in scores.items()
    ]


OWN: dict[str, dict[str, Any]] = {"norms": {"norms": 0.7}}


def first_cells(table: Table) -> set[tuple[str, ...]]:
    return {tuple(row[:2]) for row in table.rows}


@with_role(Role.ATTACK)
def test_its_rows_and_its_series(added: Method, tmp_path: Path):
    results = measured(0.65)
    runs = fine_tunes(results)
    expected = {("base", "Norms alone"), ("pmp", "Norms alone")}
    for table in (table_methods(runs), table_canonical(runs)):
        assert expected <= first_cells(table)
    assert {(title, arm) for arm, title in expected} <= first_cells(table_one(results, runs))
    pictures: dict[str, Picture] = draw(tmp_path, results, runs, headline(results, runs, {}))
    assert "Norms alone" in (tmp_path / f"{pictures['figure3'].name}.svg").read_text()


@with_role(Role.ATTACK)
def test_an_attack_is_one_of_the_attackers(added: Method):
    """It is the best of PMP, 5 points above full fine-tuning, and its own setting keeps it out of
    no comparison."""
    runs = fine_tunes(measured(0.65))
    assert gap(runs).estimates["SST-2"].mean == pytest.approx(70 - 65)
    assert authorized(runs).estimates["SST-2"].mean == pytest.approx(60 - 65)
    swept = [run for lr in (1e-5, 1e-4, 1e-3) for run in measured(0.6 + lr, lr=lr)]
    assert "pmp, sst2, norms: 0.001" in edges(fine_tunes(swept))


@with_role(Role.AUTHORIZED)
def test_what_has_the_ticket_is_a_way_to_use_it(added: Method):
    runs = fine_tunes(measured(0.65))
    assert authorized(runs).estimates["SST-2"].mean == pytest.approx(65 - 60)
    assert gap(runs).estimates["SST-2"].mean == pytest.approx(70 - 60)


@with_role(Role.GUESS)
def test_a_guess_is_compared_with_the_ticket(added: Method):
    assert secret(fine_tunes(measured(0.65))).estimates["SST-2"].mean == pytest.approx(60 - 65)
    arms = {"base": Arm(settings={"mask.source": "none"}), "pmp": Arm()}
    tuning = Tuning(arms=["pmp"], tasks=["rte"], methods=["norms"], sweep={"seed": [0]})
    (step,) = (s for s in steps(Study(arms=arms, tunings=[tuning])) if s.independent)
    assert "--density" in step.argv


@with_role(Role.CONTROL)
def test_a_control_is_listed(added: Method):
    results = measured(0.65)
    found = {control.name: control.found for control in controls(results, fine_tunes(results))}
    assert found["Norms alone, fine-tuned on PMP"] == "2 runs, tasks sst2"
    assert gap(fine_tunes(results)).estimates["SST-2"].mean == pytest.approx(70 - 60)


@with_role(Role.AUTHORIZED)
def test_the_order_is_that_of_the_roles(added: Method):
    names = [method.name for method in reported()]
    assert names == ["full", "lora", "ticket", "norms", "random", "recovered", "complement"]
