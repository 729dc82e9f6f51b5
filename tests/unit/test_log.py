import json

import pytest

from pmp_ds.log import MetricsLog, read_metrics, rewind_metrics
from pmp_ds.run_dir import RunDir


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "x")
    run.create()
    return run


def write(run: RunDir, *records: tuple[str, int], enabled: bool = True) -> None:
    log = MetricsLog(run, enabled=enabled)
    for phase, step in records:
        log.write(phase, step, loss=step / 2)
    log.close()


def steps(run: RunDir) -> list[tuple[str, int]]:
    return [(record["phase"], record["step"]) for record in read_metrics(run.metrics)]


ALL = [("discover", 1), ("discover", 2), ("train", 0), ("train", 1), ("train", 2), ("train", 3)]


def test_one_json_line_per_record_at_once(run):
    log = MetricsLog(run, enabled=True)
    log.write("train", 7, loss=2.5, lr=1e-5)
    lines = run.metrics.read_text().splitlines()  # before close: a kill loses nothing
    log.close()
    assert [json.loads(line) for line in lines] == [
        {"phase": "train", "step": 7, "loss": 2.5, "lr": 1e-5}
    ]
    assert list(run.tensorboard.iterdir())


def test_appends(run):
    write(run, *ALL[:2])
    write(run, *ALL[2:])
    assert steps(run) == ALL


def test_other_ranks_write_nothing(run):
    write(run, *ALL, enabled=False)
    assert not run.metrics.exists()
    assert not run.tensorboard.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_still_json(run, value):
    log = MetricsLog(run, enabled=True)
    log.write("train", 1, loss=value)
    log.close()
    (record,) = [
        json.loads(line, parse_constant=pytest.fail)
        for line in run.metrics.read_text().splitlines()
    ]
    assert record["loss"] == str(value)


def test_no_file_no_records(run):
    assert read_metrics(run.metrics) == []


@pytest.mark.parametrize("left", [1, 10, -2])
def test_last_line_cut_off_by_a_kill_is_dropped(run, left):
    write(run, *ALL)
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:-1]) + lines[-1][:left])
    assert steps(run) == ALL[:-1]


def test_zeros_after_a_power_cut_are_dropped(run):
    write(run, *ALL)
    with run.metrics.open("ab") as file:
        file.write(b"\0" * 40)
    assert steps(run) == ALL


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        ({"discover": 500, "train": 2}, ALL[:5]),
        ({"discover": 500, "train": 0}, ALL[:3]),
        ({"discover": 500}, ALL[:2]),  # no checkpoint yet: the training starts again
        ({"discover": 1, "train": 9}, [ALL[0], *ALL[2:]]),
        ({}, []),
    ],
)
def test_rewind_by_hand(run, last, kept):
    write(run, *ALL)
    rewind_metrics(run.metrics, last)
    assert steps(run) == kept
    assert [r["loss"] for r in read_metrics(run.metrics)] == [step / 2 for _, step in kept]


def test_rewind_mends_a_cut_line_so_that_appending_is_safe(run):
    write(run, *ALL)
    with run.metrics.open("a") as file:
        file.write('{"phase": "train", "st')
    rewind_metrics(run.metrics, {"discover": 9, "train": 3})
    write(run, ("train", 4))
    assert steps(run) == [*ALL, ("train", 4)]


def test_rewind_of_a_new_run(run):
    rewind_metrics(run.metrics, {})
    assert read_metrics(run.metrics) == []
