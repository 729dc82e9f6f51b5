"""On request a run saves after the update, stops, and resumes from there: by signals and by
time."""

import signal
from itertools import product

import pytest

from tests.helpers.faults import seen
from tests.helpers.lives import act, checkpoints, comparable, raise_signal, same_end
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

DISCOVER = (
    "--mask.source",
    "earlybird",
    "--mask.iou_threshold",
    "1.0",
    "--mask.on_unstable",
    "last",
    "--mask.max_steps",
    "7",
    "--run.checkpoint_every",
    "4",
)


@pytest.mark.parametrize(
    "number", daily([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], [signal.SIGTERM])
)
def test_signal_to_one_rank(lives, run, calm, number):
    before = signal.getsignal(number)
    one, other = lives(fault=act, given=(6, 1, raise_signal, number))
    seen("signal", one.code, one.err)
    assert f"stopped: {number.name}: " in one.err
    assert (other.code, checkpoints(run)) == (75, [4, 7])  # known while update 7 is computed
    assert signal.getsignal(number) == before
    one, _ = lives()
    assert one.code == 0
    assert "resuming after update 7 of 12" in one.out
    same_end(calm, run)


@pytest.mark.parametrize("update", [11, 12])
def test_signal_within_the_last_updates(lives, run, calm, update):
    one, _ = lives(fault=act, given=(update, 0, raise_signal, signal.SIGTERM))
    assert (one.code, one.err) == (0, one.err.replace("stopped", ""))
    same_end(calm, run)


def test_signal_while_a_checkpoint_is_due(lives, run, calm):
    """The checkpoint is written once."""
    one, _ = lives(fault=act, given=(8, 1, raise_signal, signal.SIGTERM))
    assert (one.code, checkpoints(run)) == (75, [4, 8])
    assert lives()[0].code == 0
    same_end(calm, run)


@pytest.mark.parametrize(
    ("score", "background"),
    daily(product(["mean", "gradient"], ["true", "false"]), [("mean", "true")]),
)
def test_signal_in_discovery(lives, run, tmp_path, background, score):
    """Scores, IoU history and candidates are restored: ticket and metrics equal those of one
    run."""
    flags = (*DISCOVER, "--mask.score", score, "--run.async_save", background)
    assert lives(*flags, "--run.name", "whole")[0].code == 0
    one, _ = lives(*flags, fault=act, given=(3, 1, raise_signal, signal.SIGTERM))
    seen("signal in discovery", one.code, one.err)
    assert checkpoints(run, "discover") == [3]
    one, _ = lives(*flags, fault=act, given=(6, 0, raise_signal, signal.SIGTERM))
    assert "resuming discovery after update 3" in one.out
    assert (one.code, checkpoints(run, "discover")) == (75, [4, 6])
    assert lives(*flags)[0].code == 0
    assert checkpoints(run, "discover") == []
    same_end(type(run)(tmp_path / "whole"), run)


STABLE = (
    "--mask.source",
    "earlybird",
    "--mask.iou_threshold",
    "0.01",
    "--mask.patience",
    "3",
    "--mask.max_steps",
    "9",
)


@pytest.mark.parametrize("last", daily([(STABLE,), (DISCOVER,)], [(STABLE,)]))
def test_signal_within_the_last_update_of_discovery(lives, run, tmp_path, last):
    """The stable mask, or the last one, is the ticket: no update is added."""
    assert lives(*last, "--run.name", "whole")[0].code == 0
    whole = type(run)(tmp_path / "whole")
    end = max(r["step"] for r in comparable(whole.metrics) if r["phase"] == "discover")
    assert end == (4 if last is STABLE else 7)
    one, _ = lives(*last, fault=act, given=(end, 1, raise_signal, signal.SIGTERM))
    assert (one.code, checkpoints(run, "discover")[-1]) == (75, end)
    assert lives(*last)[0].code == 0
    same_end(whole, run)


def test_time_that_is_over(lives, run, calm):
    one, other = lives("--run.max_time", "0.001")
    seen("max_time", one.code, one.err)
    assert (other.code, checkpoints(run)) == (75, [2])
    assert lives("--run.max_time", "01:00:00")[0].code == 0
    same_end(calm, run)
