"""The number of checkpoints that a run is said to need room for is what pruning leaves."""

from pathlib import Path

import pytest

from pmp_ds.run_dir import RunDir
from pmp_ds.state import shelf
from pmp_ds.state.manifest import Position, write_manifest
from pmp_ds.state.shelf import most_at_once


def position(step: int) -> Position:
    return Position(step=step, consumed_samples=0, ticket_id=None, dataset_id="d", val_loss=None)


@pytest.mark.parametrize(
    ("steps", "every", "keep_last", "keep_every", "expected"),
    [
        (40, 1, 2, 1, 40),  # all
        (40, 1, 2, 0, 3),
        (40, 4, 1, 6, 2 + 2),  # 12 and 24 of 4, 8 .. 32; then 36 and the one at 40
        (41, 4, 1, 6, 2 + 3),  # and 36, when 40 is the newest and 41 is written
        (30, 4, 3, 8, 4 + 2),
        (5, 4, 1, 7, 2),
    ],
)
def test_as_many_as_pruning_leaves(
    tmp_path: Path, steps: int, every: int, keep_last: int, keep_every: int, expected: int
):
    run = RunDir(tmp_path / "run")
    run.create()
    most = 0
    for step in range(1, steps + 1):
        if step % every == 0 or step == steps:
            at = position(step)
            (run.checkpoints / at.name).mkdir(parents=True)
            write_manifest(run.checkpoints / at.name, at, {})
            most = max(most, len(list(run.checkpoints.glob("update-*"))))
            shelf.prune(run, "train", keep_last, keep_every, at.name)
    assert most == expected
    assert most_at_once(-(-steps // every), every, keep_last, keep_every) == expected


def test_a_short_run_may_still_stop_and_save():
    assert most_at_once(0, 500, 2) == most_at_once(1, 500, 2, 500) == 3
