"""Crafted untrusted files: each works, or is refused in one printable line.

A sample of the inputs; `python -m tests.helpers.crafted` opens them all and prints a table.
"""

import pytest

from tests.helpers.crafted.corpus import inputs
from tests.helpers.crafted.kinds import FOLDERS, KINDS
from tests.helpers.crafted.runner import Outcome, outcomes

pytestmark = pytest.mark.processes

EVERY = {"results": 178, "run": 62, "pictures": 46, "release": 38, "store": 38, "corpus": 58}
"""Of the larger kinds one in so many; of the others one in 13."""


def sample(kind: str) -> list[tuple[str, str]]:
    return [(kind, one.name) for one in inputs(kind)[:: EVERY.get(kind, 13)]]


@pytest.fixture(scope="module")
def found() -> dict[str, list[Outcome]]:
    """Return the outcomes of the sample, by kind."""
    seen: dict[str, list[Outcome]] = {kind: [] for kind in FOLDERS}
    for outcome in outcomes([one for kind in FOLDERS for one in sample(kind)]):
        seen[outcome.kind].append(outcome)
    return seen


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", FOLDERS)
def test_refused_in_a_line_or_opened(found: dict[str, list[Outcome]], kind: str) -> None:
    bad = [one for one in found[kind] if not one.good]
    assert len(found[kind]) == len(sample(kind))
    assert not bad, "\n".join(f"{one.name}: {one.what} {one.said}" for one in bad)


def test_there_are_many() -> None:
    """All names differ, so that each can be run alone."""
    everything = [(one.kind, one.name) for kind in KINDS for one in inputs(kind)]
    assert len(everything) == len(set(everything))
    assert len(everything) > 12_000
