"""Whole jobs of the product on the pretend device: they are correct on it, and cost what costs.py
says."""

from pathlib import Path

import pytest

from tests.helpers.distributed import RankPool
from tests.helpers.tiers import daily
from tests.pretend.costs import COSTS, QUICK, Costs, table
from tests.pretend.job import Setup, measure

pytestmark = [pytest.mark.pretend, pytest.mark.distributed]

LARGEST = 201  # tensors
NOTHING = 0.5  # bytes per parameter: constants and small buffers
MOST_LAUNCHES, MOST_BYTES = 50, 26  # of the optimizer phase; bytes per parameter at density 0.7


@pytest.mark.parametrize("setup", daily(COSTS, QUICK), ids=str)
def test_a_job(request: pytest.FixtureRequest, tmp_path: Path, setup: Setup) -> None:
    ranks: RankPool = request.getfixturevalue(f"pretend{setup.ranks}")
    found = ranks.run(measure, setup, str(tmp_path), timeout=240)
    for rank in found:
        assert dict(rank.faults) == {}, "races, mixed devices, memory freed too early"
        assert rank.losses[-1] < rank.losses[0] - 0.1, "it learns"
        assert len(rank.losses) >= 2
        assert rank.bytes_left < NOTHING * rank.num_params, "a closed engine frees its memory"
    assert found[0].complement_changed == 0
    costs = Costs.of(found)
    assert costs.within(COSTS[setup]), (
        f"write down what it is (python -m tests.pretend --python), and in docs/PERFORMANCE.md:\n"
        f"{setup!r}: {costs!r}"
    )


def test_the_written_costs_are_those_of_a_good_step() -> None:
    """The goals of the masked step, whatever is measured later."""
    for setup, costs in COSTS.items():
        assert costs.bytes_per_parameter <= MOST_BYTES, setup
        if setup.stage < 3:  # DeepSpeed's stage 3 gathers small parameters one by one
            assert costs.launches <= MOST_LAUNCHES, setup
        if setup.stage < 3 and not setup.offload:
            assert costs.waits == (setup.precision == "fp16"), setup
    assert any(setup.num_tensors == LARGEST for setup in COSTS)


def test_the_table_is_in_the_documents() -> None:
    documents = Path(__file__).parents[2] / "docs"
    text = (documents / "PERFORMANCE.md").read_text(encoding="utf-8")
    assert table(COSTS) in text, "python -m tests.pretend prints it"
