"""Which tests run, on which worker, and how long they took: the hooks of tests/conftest.py.

pytest -m 'not nightly'                  what `make test` runs
pytest -m nightly --slice=2/6            a sixth of the rest, the same every time
pytest --record=.durations               writes .durations/TIME.json, slowest test first
"""

import json
import re
import zlib
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

SLOW_SECONDS = 20.0
"""Seconds; a slower test belongs to `make nightly`, or needs a cheaper proof."""

WITH_RANKS = ("tests/distributed/", "tests/unit/optim/test_contract.py")
"""Tests that use the fixtures ranks1 to ranks4: in one worker of xdist, because each pool is
costly."""

WITHOUT = ("tests/distributed/test_lifeline.py", "tests/distributed/test_on_fault.py")
"""Files there that start processes of their own."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--slice", type=_slice, metavar="I/N", help="only part I of N of the tests")
    group.addoption("--record", metavar="FOLDER", help="write the seconds of each test there")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with xdist, the process that receives all reports
        config.pluginmanager.register(_Durations(config.getoption("--record")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a whole group at a time to a worker of xdist. (The marks of `--dist loadgroup` have no
    effect under pytest 9.2: xdist 3.8 writes them into an attribute that is no longer read.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False  # in the order of `items` below
    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _place(group(item.nodeid)))
    if part := config.getoption("--slice"):
        left_out = [item for item in items if not in_slice(item.nodeid, *part)]
        items[:] = [item for item in items if in_slice(item.nodeid, *part)]
        config.hook.pytest_deselected(items=left_out)


def daily(cases: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """Return parameters of a test: those ``chosen`` run in `make test`, the others in `make
    nightly`. A tuple is the values of several parameters."""
    found = list(cases)
    assert all(case in found for case in chosen), "a case that does not exist"
    rows = [(case, case if isinstance(case, tuple) else (case,)) for case in found]
    return [
        pytest.param(*values, marks=() if case in chosen else pytest.mark.nightly)
        for case, values in rows
    ]


def in_slice(nodeid: str, part: int, parts: int) -> bool:
    """Return whether a test belongs to slice ``part`` of ``parts``; both count from 1."""
    return zlib.crc32(nodeid.encode()) % parts == part - 1


def _slice(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(text)  # argparse names the option
    return int(match[1]), int(match[2])


def group(nodeid: str) -> str:
    """Return the group of a test: tests that share something costly, otherwise the tests of a
    file."""
    file = nodeid.partition("::")[0]
    if file.startswith(WITH_RANKS) and file not in WITHOUT:
        return "ranks"
    if file.startswith("tests/pretend/"):
        return "pretend"
    return "run" if file.startswith("tests/e2e/") else file  # its fixture main_run


def _place(name: str) -> int:
    """Start the groups that take longest first."""
    return ("ranks", "run").index(name) if name in ("ranks", "run") else 2


class _Durations:
    """Sum set-up, call and tear-down of every test."""

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.nightly: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        nodeid = report.nodeid
        self.seconds[nodeid] = self.seconds.get(nodeid, 0.0) + report.duration
        if "nightly" in report.keywords:
            self.nightly.add(nodeid)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        order = sorted(self.seconds.items(), key=lambda row: -row[1])
        for nodeid, seconds in order:
            if seconds > SLOW_SECONDS and nodeid not in self.nightly:
                terminalreporter.write_line(f"slow: {nodeid} took {seconds:.0f} s; not nightly")
        if self.folder is not None:
            now = datetime.now(UTC)
            path = Path(self.folder) / f"{now:%Y%m%d-%H%M%S}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            found = {nodeid: round(seconds, 2) for nodeid, seconds in order}
            path.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
            terminalreporter.write_line(f"durations of {len(found)} tests: {path}")
