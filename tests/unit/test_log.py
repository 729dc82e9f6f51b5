import itertools
import json
import math
import resource
import signal
import subprocess
import time
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pmp_ds.errors import UserError
from pmp_ds.log import TIMINGS, begin, read_metrics, read_starts
from pmp_ds.log.records import faults
from pmp_ds.log.writer import MetricsLog
from pmp_ds.run_dir import RunDir


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "x")
    run.create()
    return run


def write(
    run: RunDir, *records: tuple[str, int], enabled: bool = True, code: int | None = 0
) -> None:
    log = MetricsLog(run, enabled=enabled)
    for phase, step in records:
        log.write(phase, step, loss=step / 2)
    log.close(code)


def steps(run: RunDir) -> list[tuple[str, int]]:
    return [(record["phase"], record["step"]) for record in read_metrics(run.metrics)]


ALL = [("discover", 1), ("discover", 2), ("train", 0), ("train", 1), ("train", 2), ("train", 3)]


def test_one_json_line_per_record_at_once(run):
    begin(run.metrics, {})
    before = time.time()
    log = MetricsLog(run, enabled=True)
    log.write("train", 7, loss=2.5, lr=1e-5)
    lines = run.metrics.read_text().splitlines()  # before close: a kill loses nothing
    log.close()
    first, record = map(json.loads, lines)
    assert (first["phase"], first["start"], first["resumed"]) == ("start", 1, {})
    seconds = record.pop("time")
    assert before - 0.001 <= seconds <= time.time() + 0.001
    assert record == {"phase": "train", "step": 7, "loss": 2.5, "lr": 1e-5, "start": 1}
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
    record, _ = [
        json.loads(line, parse_constant=pytest.fail)
        for line in run.metrics.read_text().splitlines()
    ]
    assert record["loss"] == str(value)


def test_no_file_no_records(run):
    assert read_metrics(run.metrics) == []


@pytest.mark.parametrize("left", [1, 10, -2])
def test_last_line_cut_off_by_a_kill_is_dropped(run, left):
    write(run, *ALL, code=None)
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:-1]) + lines[-1][:left])
    assert steps(run) == ALL[:-1]


def test_zeros_after_a_power_cut_are_dropped(run):
    write(run, *ALL)
    with run.metrics.open("ab") as file:
        file.write(b"\0" * 40)
    assert steps(run) == ALL


@pytest.mark.parametrize(
    ("resumed", "kept"),
    [
        ({"discover": 500, "train": 2}, ALL[:5]),
        ({"discover": 500, "train": 0}, ALL[:3]),
        ({"discover": 500}, ALL[:2]),  # no checkpoint yet: the training starts again
        ({"discover": 1, "train": 9}, [ALL[0], *ALL[2:]]),
        ({}, []),
    ],
)
def test_superseded_by_hand(run, resumed, kept):
    """The records are as if the later ones had been deleted, but every byte is still there."""
    write(run, *ALL)
    before = run.metrics.read_bytes()
    assert begin(run.metrics, resumed) == 2
    assert steps(run) == kept
    assert [r["loss"] for r in read_metrics(run.metrics)] == [step / 2 for _, step in kept]
    assert run.metrics.read_bytes().startswith(before)
    write(run, ("train", 9))
    assert steps(run) == [*kept, ("train", 9)]
    assert read_metrics(run.metrics)[-1]["start"] == 2


def rewound(records: list[tuple[str, int]], resumed: dict[str, int]) -> list[tuple[str, int]]:
    """Delete what a start repeats: the rule, in the plainest way."""
    return [(phase, step) for phase, step in records if step <= resumed.get(phase, -1)]


def test_several_starts_equal_deletion(run):
    """Every sequence of three starts, each with records of its own, against deletion."""
    points = [{}, {"discover": 1}, {"discover": 500, "train": 1}, {"discover": 500, "train": 3}]
    for number, chosen in enumerate(itertools.product(points, repeat=3)):
        one = RunDir(run.root / str(number))
        one.create()
        expected: list[tuple[str, int]] = []
        for resumed in chosen:
            begin(one.metrics, resumed)
            expected = rewound(expected, resumed)
            log = one.metrics.open("ab")
            for phase, step in ALL:
                if step > resumed.get(phase, -1):
                    record = {"phase": phase, "step": step, "loss": 1.0}
                    log.write(json.dumps(record).encode() + b"\n")
                    expected.append((phase, step))
            log.close()
        assert steps(one) == expected


def test_file_of_an_older_version(run):
    """Its records have neither time nor start, and no start is recorded."""
    lines = [json.dumps({"phase": phase, "step": step, "loss": 1.0}) for phase, step in ALL]
    run.metrics.write_text("\n".join(lines) + "\n")
    assert steps(run) == ALL
    assert begin(run.metrics, {"discover": 500, "train": 1}) == 2
    write(run, ("train", 2))
    assert steps(run) == [*ALL[:4], ("train", 2)]
    first, second = read_starts(run.metrics)
    assert (first.number, first.began, first.last) == (1, None, ("train", 3))
    assert (second.number, second.resumed, second.code) == (2, {"discover": 500, "train": 1}, 0)
    assert faults([first, second]) == 0


@pytest.mark.parametrize("cut", [b'{"phase": "train", "st', b"\0" * 40, b'{"phase": "start", "r'])
def test_a_cut_line_damages_no_other(run, cut):
    """Two kills in a row, the second in the middle of the record of the start."""
    write(run, *ALL, code=None)
    for number, more in ((2, b""), (3, b'\n{"phase": "sta'), (4, b"")):
        with run.metrics.open("ab") as file:
            file.write(cut + more)
        assert begin(run.metrics, {"discover": 9, "train": 3}) == number
        assert steps(run) == ALL
    write(run, ("train", 4))
    assert steps(run) == [*ALL, ("train", 4)]


def test_a_damaged_line_elsewhere_is_named(run):
    write(run, *ALL)
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join([*lines[:2], lines[2][:-5] + "\n", *lines[3:]]))
    with pytest.raises(UserError, match="line 3 is damaged"):
        read_metrics(run.metrics)


def test_a_full_disk_leaves_whole_lines(run, monkeypatch):
    """The line that found no room is taken back, so a later one does not stick to its half."""
    monkeypatch.setattr("pmp_ds.log.writer.Board", mock.Mock())  # its thread may fail in any test
    log = MetricsLog(run, enabled=True)
    log.write("train", 1, loss=1.0)
    size = run.metrics.stat().st_size
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, old[1]))
        with pytest.raises(UserError, match=r"cannot be written: .*Make room"):
            log.write("train", 2, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert run.metrics.stat().st_size == size
    log.close(1)
    assert steps(run) == [("train", 1)]


@pytest.mark.processes
def test_tail_follows_a_resume(run, tmp_path):
    """`tail -f` shows each line once and says nothing of a truncated or replaced file."""
    begin(run.metrics, {})
    write(run, *ALL, code=None)
    with (tmp_path / "seen").open("wb") as seen, (tmp_path / "said").open("wb") as said:
        tail = subprocess.Popen(
            ["tail", "-n", "+1", "-s", "0.05", "-f", run.metrics], stdout=seen, stderr=said
        )
        try:
            _until(lambda: (tmp_path / "seen").read_bytes().count(b"\n") == 1 + len(ALL))
            begin(run.metrics, {"discover": 9, "train": 1})
            write(run, ("train", 2), ("train", 3))
            whole = run.metrics.read_bytes()
            _until(lambda: len((tmp_path / "seen").read_bytes()) >= len(whole))
        finally:
            tail.kill()
            tail.wait()
    assert (tmp_path / "seen").read_bytes() == whole
    assert (tmp_path / "said").read_bytes() == b""


def _until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_starts_and_faults(run):
    """A start without an end was a fault; one that stopped on request was not."""
    for code in (None, 75, 1, 0):
        begin(run.metrics, {})
        write(run, ("train", 1), code=code)
    starts = read_starts(run.metrics)
    assert [start.number for start in starts] == [1, 2, 3, 4]
    assert [start.code for start in starts] == [None, 75, 1, 0]
    assert all((start.began or math.inf) <= (start.ended or 0.0) for start in starts)
    assert faults(starts) == 2


def shown(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows: the points of each tag."""
    board = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    board.Reload()
    tags = board.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags}


def test_tensorboard_groups(run):
    log = MetricsLog(run, enabled=True)
    log.write("discover", 2, loss=4.0, iou=0.5)
    log.write("discover", 2, save_seconds=1.0)
    log.write("train", 0, val_loss=4.5, **{"mnli/accuracy": 0.25})
    log.write("train", 1, loss=4.0, lr=0.5, grad_norm=math.inf, tokens_per_second=8.0, mfu=0.5)
    log.write("train", 1, skipped=1.0)
    log.close()
    points = shown(run)
    assert points.pop("train/grad_norm") == [(1, math.inf)]
    assert points == {
        "discovery/loss": [(2, 4.0)],
        "discovery/iou": [(2, 0.5)],
        "system/discovery/save_seconds": [(2, 1.0)],
        "eval/val_loss": [(0, 4.5)],
        "eval/mnli/accuracy": [(0, 0.25)],
        "train/loss": [(1, 4.0)],
        "train/lr": [(1, 0.5)],
        "train/skipped": [(1, 1.0)],
        "system/tokens_per_second": [(1, 8.0)],
        "system/mfu": [(1, 0.5)],
    }


@pytest.mark.parametrize(
    "resumed",
    [{"discover": 500, "train": 1}, {"discover": 500, "train": 9}, {"discover": 500}, {}],
)
def test_tensorboard_shows_no_superseded_point(run, resumed):
    """Discovery's points stay, although TensorBoard hides all points after an update at once."""
    first = [("discover", step) for step in range(1, 8)] + [("train", step) for step in range(10)]
    begin(run.metrics, {})
    write(run, *first, code=None)
    begin(run.metrics, resumed)
    write(run, *[("train", step) for step in range(resumed.get("train", -1) + 1, 4)])
    points, records = shown(run), read_metrics(run.metrics)
    for phase, tag in (("discover", "discovery/loss"), ("train", "train/loss")):
        valid = [(r["step"], r["loss"]) for r in records if r["phase"] == phase]
        assert sorted(points.get(tag, [])) == valid


def test_timings_name_what_differs():
    assert {"time", "start", "save_seconds"} <= TIMINGS


def test_close_without_an_end(run):
    """A log that is closed after its file system filled up says nothing more."""
    log = MetricsLog(run, enabled=True)
    log.close(None)
    assert run.metrics.read_bytes() == b""
