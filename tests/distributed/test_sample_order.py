"""A run that stops and resumes with other ranks gets the samples of a run that never stopped."""

from typing import Any

import pytest

from pmp_ds.data.loader import order_key
from pmp_ds.data.mixed_store import open_data
from pmp_ds.engine.objective import NextToken
from pmp_ds.train.session import Work
from tests.helpers.stores import write_store

pytestmark = pytest.mark.distributed

BATCH, STEPS = 8, 60
LEGS = (("ranks1", 37), ("ranks3", 11), ("ranks2", 12))


def read(setting: Any, consumed: int, steps: int) -> tuple[list[list[int]], int]:
    """Return the block numbers of this rank in each update, and the state at the end."""
    work = Work(
        name="train",
        model=None,
        objective=NextToken(),
        samples=open_data(setting).split("train"),
        order=order_key("train", 0),
        dataset_id="",
        tokens_per_sample=8,
        steps=STEPS,
    )
    with work.loader(BATCH, consumed) as loader:
        found = [loader.next()[:, 0].tolist() for _ in range(steps)]
        return found, loader.consumed_samples


def in_order(ranks: list[tuple[list[list[int]], int]]) -> list[int]:
    """Return the global stream: for every update, the ranks' shares in rank order."""
    updates = zip(*(found for found, _ in ranks), strict=True)
    return [i for update in updates for share in update for i in share]


@pytest.mark.parametrize("mixed", [False, True], ids=["store", "mixture"])
def test_one_rank_then_three_then_two(request, tmp_path, mixed):
    web = write_store(tmp_path / "web", 0, 150, shard=40)  # 480 samples: over three epochs
    code = write_store(tmp_path / "code", 1000, 50)
    setting = {web: 0.6, code: 0.4} if mixed else web
    whole = in_order(request.getfixturevalue("ranks1").run(read, setting, 0, STEPS))
    assert len(whole) == BATCH * STEPS
    assert len(set(whole)) == (200 if mixed else 150)
    if not mixed:  # every epoch has every block once
        for epoch in range(3):
            assert sorted(whole[150 * epoch : 150 * (epoch + 1)]) == list(range(150))

    found: list[int] = []
    for pool, steps in LEGS:
        ranks = request.getfixturevalue(pool).run(read, setting, len(found), steps)
        found += in_order(ranks)
        assert {consumed for _, consumed in ranks} == {len(found)}
    assert found == whole
