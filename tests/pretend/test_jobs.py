"""Whole jobs of the product on the pretend device: they are correct on it, and cost what costs.py
says."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.helpers.distributed import RankPool
from tests.helpers.tiers import daily
from tests.pretend.costs import COSTS, QUICK, Costs, table
from tests.pretend.job import VOCAB, Measured, Setup, measure

pytestmark = [pytest.mark.pretend, pytest.mark.distributed]

LARGEST = 201  # tensors
NOTHING = 0.5  # bytes per parameter: constants and small buffers
MOST_LAUNCHES, MOST_BYTES = 50, 26  # of the optimizer phase; bytes per parameter at density 0.7


Job = Callable[[Setup], list[Measured]]


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Run each job once."""
    done: dict[Setup, list[Measured]] = {}

    def run(setup: Setup) -> list[Measured]:
        if setup not in done:
            ranks: RankPool = request.getfixturevalue(f"pretend{setup.ranks}")
            folder = str(tmp_path_factory.mktemp("job"))
            done[setup] = ranks.run(measure, setup, folder, timeout=240)
        return done[setup]

    return run


@pytest.mark.parametrize("setup", daily(COSTS, QUICK), ids=str)
def test_a_job(job: Job, setup: Setup) -> None:
    found = job(setup)
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


SAME = {
    Setup(stage=2, offload=True): Setup(stage=2),
    Setup(stage=2, ranks=2, offload=True): Setup(stage=2, ranks=2),
    Setup(stage=3, offload=True): Setup(stage=3),
    Setup(stage=3, ranks=2, offload=True): Setup(stage=3, ranks=2),
    Setup(stage=2, ranks=2, overlap=True): Setup(stage=2, ranks=2),
    Setup(stage=1, ranks=2, overlap=True): Setup(stage=1, ranks=2),
    Setup(stage=2, ranks=2, offload=True, overlap=True): Setup(stage=2, ranks=2),
}


@pytest.mark.parametrize("setup", daily(SAME, [Setup(stage=2, offload=True)]), ids=str)
def test_the_same_bits(job: Job, setup: Setup) -> None:
    """Neither host memory nor another stream changes the ticket or the training. Without a wait for
    the last gradients, offload's ticket would be another."""
    for one, other in zip(job(setup), job(SAME[setup]), strict=True):
        assert one.losses == other.losses


ODD = 509  # tokens, a prime


def measure_odd(setup: Setup, folder: str) -> tuple[Measured, set[int], str]:
    """Return also how many rows the matrix products with weights had, and what was printed."""
    import contextlib
    import io

    import torch

    linear, rows, out = torch.nn.functional.linear, set(), io.StringIO()

    def recorded(hidden: Any, weight: Any, bias: Any = None) -> Any:
        rows.add(len(weight))
        return linear(hidden, weight, bias)

    with (
        mock.patch("torch.nn.functional.linear", recorded),
        mock.patch("pmp_ds.engine.forward.linear", recorded),
        contextlib.redirect_stdout(out),
    ):
        measured = measure(setup, folder)
    return measured, rows, out.getvalue()


@pytest.mark.parametrize("stage", daily([0, 1, 2, 3], [3]))
def test_an_odd_vocabulary_and_micro_batches_that_fit(
    pretend1: RankPool, tmp_path: Path, stage: int
) -> None:
    """The last projection has 512 rows, and d those of the 509 tokens; as many sequences at once as
    fit into 80 GB, all 4."""
    setup = Setup(stage=stage, vocab=ODD, micro_batch="auto")
    ((found, rows, out),) = pretend1.run(measure_odd, setup, str(tmp_path), timeout=240)
    assert found.num_params == 135_488 - 2 * (VOCAB - ODD) * 64
    assert ODD not in rows
    assert VOCAB in rows
    assert found.complement_changed == 0
    assert found.losses[-1] < found.losses[0] - 0.1
    assert dict(found.faults) == {}
    said = re.search(
        r"micro-batch 4: states (.*) MB \+ 4 x (.*) MB activations <= 90% of (.*)", out
    )
    assert said is not None, out
    assert said[3] == "85.90 GB free"
    assert 16 < float(said[1]) * 1e6 / found.num_params < 26, "bytes per parameter"
    assert float(said[2]) > 64 * VOCAB * 8 / 1e6, "logits in bf16 and in fp32, and gradients"


def test_the_written_costs_are_those_of_a_good_step() -> None:
    """The goals of the masked step, whatever is measured later."""
    for setup, costs in COSTS.items():
        assert costs.bytes_per_parameter <= MOST_BYTES, setup
        if setup.stage < 3:  # DeepSpeed's stage 3 gathers small parameters one by one
            assert costs.launches <= MOST_LAUNCHES, setup
        # The loss scale waits for gradients that are finite; under offload the host has them.
        assert costs.waits == (setup.precision == "fp16" and not setup.offload), setup
        assert costs.discovery_waits <= 3 + 2 * (setup.precision == "fp16"), setup
    assert any(setup.num_tensors == LARGEST for setup in COSTS)


def test_the_table_is_in_the_documents() -> None:
    documents = Path(__file__).parents[2] / "docs"
    text = (documents / "PERFORMANCE.md").read_text(encoding="utf-8")
    assert table(COSTS) in text, "python -m tests.pretend prints it"
