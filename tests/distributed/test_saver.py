"""Background saves write the same bytes as foreground saves and survive a full disk."""

import os
import shutil
import signal
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from pmp_ds.log import read_metrics
from pmp_ds.run_dir import RunDir
from tests.helpers.faults import seen
from tests.helpers.lives import (
    act,
    all_of,
    checkpoints,
    comparable,
    little_room,
    raise_signal,
    read_only,
    same_end,
    slow_disk,
)
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

KEEP = (
    "--run.keep_last",
    "9",
    "--mask.source",
    "earlybird",
    "--mask.max_steps",
    "6",
    "--mask.on_unstable",
    "last",
    "--run.checkpoint_every",
    "3",
)


def files(run: RunDir) -> dict[str, bytes]:
    return {
        str(path.relative_to(run.private)): path.read_bytes()
        for path in run.private.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("stage", daily([1, 3], [1]))
def test_background_and_foreground_write_the_same_bytes(lives, tmp_path, stage):
    """This includes checkpoints of discovery, which continues during the save. Discovery is
    stopped, because its checkpoints are deleted once there is a ticket."""
    term = (act, (5, 0, raise_signal, signal.SIGTERM))
    found = []
    for background in ("true", "false"):
        flags = (*KEEP, "--run.async_save", background, "--run.name", background)
        faults = ((slow_disk, (0.5 * (background == "true"),)), term)
        assert lives(*flags, fault=all_of, given=faults, stage=stage)[0].code == 75
        found.append([files(RunDir(tmp_path / background))])
        assert lives(*flags, stage=stage)[0].code == 0
        found[-1].append(files(RunDir(tmp_path / background)))
    one, two = found
    counts = [len([name for name in there if name.endswith("manifest.json")]) for there in one]
    assert counts == [2, 4]
    assert one == two
    metrics = [comparable(RunDir(tmp_path / name).metrics) for name in ("true", "false")]
    assert metrics[0] == metrics[1]


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_run_leaves_no_threads(lives, ranks2, calm):
    """Process groups leave no threads behind: a sweep makes many runs in one process."""
    assert lives("--run.name", "one")[0].code == 0
    before = ranks2.run(native_threads)
    assert lives("--run.name", "two")[0].code == 0
    assert ranks2.run(native_threads) == before


def test_time_of_saves_is_recorded(calm):
    records = [r for r in read_metrics(calm.metrics) if "save_seconds" in r]
    assert sorted(r["step"] for r in records) == [4, 8, 12]
    assert all(0 <= r["save_stall_seconds"] < 60 for r in records)


@pytest.mark.parametrize(
    ("every", "kept"), daily([("0", [10, 12]), ("6", [6, 10, 12])], [("6", [6, 10, 12])])
)
def test_every_nth_is_kept(lives, run, every, kept):
    flags = ("--run.checkpoint_every", "2", "--run.keep_every", every)
    assert lives(*flags)[0].code == 0
    assert checkpoints(run) == kept
    assert (run.checkpoints / "latest").read_text() == "update-00000012\n"


@pytest.mark.parametrize("background", daily(["true", "false"], ["true"]))
def test_disk_full(lives, run, calm, background):
    """A warning is given and training continues; the next checkpoint has room again."""
    flags = ("--run.async_save", background)
    one, other = lives(*flags, fault=little_room, given=(1, range(7, 11)))
    seen("disk full", one.code, one.err)
    assert (other.code, other.err.count("warning")) == (0, 0)
    assert checkpoints(run) == [4, 12]
    same_end(calm, run)


@pytest.mark.parametrize("background", daily(["true", "false"], ["true"]))
def test_disk_full_stops(lives, run, calm, background):
    flags = ("--guard.disk", "stop", "--run.async_save", background)
    one, other = lives(*flags, fault=little_room, given=(1, range(7, 11)))
    seen("disk full, stop", one.code, one.err)
    assert (other.code, checkpoints(run)) == (1, [4])
    assert not list(run.checkpoints.glob("*.incomplete"))
    assert lives()[0].code == 0
    same_end(calm, run)


def test_disk_full_at_the_end(lives, run, calm):
    one, other = lives(fault=little_room, given=(1, range(10, 13)))
    seen("disk full at the end", one.code, one.err)
    assert (other.code, checkpoints(run)) == (1, [4, 8])
    assert lives()[0].code == 0
    same_end(calm, run)


def test_disk_nearly_full(lives, run):
    one, _ = lives(fault=nearly_full_once)
    seen("disk nearly full", one.code, one.err)
    assert checkpoints(run) == [4, 12]


def nearly_full_once() -> Any:
    """Report hardly any free space at the second check."""
    usage, calls = shutil.disk_usage, []

    def of(path: Any) -> Any:
        calls.append(path)
        return SimpleNamespace(free=1000) if len(calls) == 2 else usage(path)

    return mock.patch.object(shutil, "disk_usage", of)


def test_metrics_on_a_full_disk(lives, run, ranks1):
    """One rank only: with more, the launcher ends the others."""
    flags = ("--train.micro_batch_size", "8")
    (one,) = lives(*flags, fault=little_room, given=(0, range(6, 13), 300), pool=ranks1)
    seen("metrics on a full disk", one.code, one.err)
    assert checkpoints(run) == [4]


def test_read_only_folder(lives, run, calm):
    one, _ = lives(fault=read_only, given=(str(run.checkpoints), range(6, 11)))
    seen("read-only folder", one.code, one.err)
    assert checkpoints(run) == [4, 12]
    same_end(calm, run)
