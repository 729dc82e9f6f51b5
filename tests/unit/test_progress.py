"""A bar on a terminal, few lines in a log, silence on other ranks."""

import io
import os
import re

import pytest

from pmp_ds import progress as module
from pmp_ds import verbosity
from pmp_ds.progress import Progress, progress

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_log_gets_a_line_per_interval_and_a_last_one(clock: list[float]):
    stream = io.StringIO()
    with Progress("work", "step", 100, stream=stream) as bar:
        for _ in range(50):
            clock[0] += 0.5
            bar.set(loss="1.25")
            bar.update()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # after 10, 20 and 25 seconds
    assert re.fullmatch(
        STAMP + r" work:\s+20% 20/100 \[00:10<00:40,\s+2\.00 step/s, loss=1\.25\]", lines[0]
    ), lines[0]
    assert "50/100" in lines[-1]
    assert "\r" not in stream.getvalue()


def test_rate_counts_from_the_resumed_step(clock: list[float]):
    stream = io.StringIO()
    bar = Progress("work", "step", 200, initial=100, stream=stream)
    clock[0] += 10
    bar.update(50)
    assert "150/200 [00:10<00:10" in stream.getvalue()
    bar.close()
    bar.close()
    assert stream.getvalue().count("\n") == 1  # nothing new to say


def test_without_total(clock: list[float]):
    stream = io.StringIO()
    with Progress("read", "B", scale=True, stream=stream) as bar:
        clock[0] += 20
        bar.update(3_000_000)
    assert "3.00M" in stream.getvalue()
    assert "%" not in stream.getvalue()


def test_terminal_gets_a_bar():
    stream = Terminal()
    with Progress("work", "step", 3, stream=stream) as bar:
        bar.set(loss="0.5")
        bar.update(3)
    assert "\r" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "loss=0.5" in stream.getvalue()


@pytest.mark.parametrize("make", [io.StringIO, Terminal])
def test_other_ranks_and_disabled_are_silent(make, monkeypatch: pytest.MonkeyPatch):
    stream = make()
    with Progress("work", "step", 3, stream=stream, disable=True, interval=0) as bar:
        bar.update()
    monkeypatch.setitem(os.environ, "RANK", "1")
    with Progress("work", "step", 3, stream=stream, interval=0) as bar:
        bar.update()
        bar.set(loss=1)
    assert stream.getvalue() == ""
    assert bar.n == 1


def test_iterates_and_knows_the_length(capsys: pytest.CaptureFixture[str]):
    assert list(progress([1, 2, 3], "work", "item")) == [1, 2, 3]
    assert "work: 100% 3/3" in capsys.readouterr().err
    assert list(progress(iter([1, 2]), "work", "item")) == [1, 2]
    assert "work: 2 item" in capsys.readouterr().err
    assert list(progress([1], "work", "item", disable=True)) == [1]
    assert capsys.readouterr().err == ""


def test_nothing_at_level_warning(clock: list[float]):
    stream, terminal = io.StringIO(), Terminal()
    verbosity.choose("warning")
    try:
        for one in (stream, terminal):
            with Progress("work", "step", 10, stream=one) as bar:
                clock[0] += 20
                bar.update(10)
    finally:
        verbosity.choose("info")
    assert stream.getvalue() == terminal.getvalue() == ""
