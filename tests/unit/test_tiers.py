"""The hooks of tests/helpers/tiers.py in small runs of pytest; what CI runs."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.tiers import SLOW_SECONDS, group, in_slice

pytest_plugins = ["pytester"]
REPO = Path(__file__).resolve().parents[2]
SUITE = """
import time, pytest

@pytest.mark.nightly
@pytest.mark.parametrize("i", range(20))
def test_long(i): pass

def test_short(): time.sleep(0.1)
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    hooks = "pytest_addoption, pytest_collection_modifyitems, pytest_configure"
    pytester.makeconftest(f"from tests.helpers.tiers import {hooks}")
    pytester.makeini("[pytest]\nmarkers =\n  nightly: x")
    pytester.makepyfile(SUITE)
    return pytester


def test_slices_together_are_every_nightly_test_once(suite: pytest.Pytester) -> None:
    found: list[str] = []
    for part in (1, 2, 3):
        run = suite.runpytest_inprocess("-m", "nightly", "--slice", f"{part}/3", "-v")
        names = re.findall(r"::(test_\w+\[\d+\]) PASSED", run.stdout.str())
        assert 0 < len(names) < 20
        found += names
    assert sorted(found) == sorted(f"test_long[{i}]" for i in range(20))
    assert [part for part in (1, 2, 3) if in_slice("tests/a.py::test_b[c]", part, 3)] == [1]


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b"])
def test_what_is_no_slice(suite: pytest.Pytester, text: str) -> None:
    run = suite.runpytest_inprocess("--slice", text)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    assert "--slice" in run.stderr.str()


def test_durations_are_written_slowest_first_and_slow_ones_are_named(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.tiers.SLOW_SECONDS", 0.05)
    run = suite.runpytest_inprocess("--record", "seconds")
    (file,) = (suite.path / "seconds").iterdir()
    rows = json.loads(file.read_text())
    assert len(rows) == 21
    name, seconds = next(iter(rows.items()))
    assert name.endswith("::test_short")
    assert 0.1 <= seconds < SLOW_SECONDS
    assert list(rows.values()) == sorted(rows.values(), reverse=True)
    assert run.stdout.str().count("slow: ") == 1
    assert run.ret == 0


@pytest.mark.processes
def test_what_shares_ranks_or_a_run_shares_a_worker(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other file builds the pools a second time."""
    files = [path for path in (REPO / "tests").rglob("test_*.py") if path != Path(__file__)]
    pooled = {
        str(path.relative_to(REPO))
        for path in files
        if re.search(r"^def \w+\([^)]*\b(ranks[1-4]|lives)\b", path.read_text(), re.MULTILINE)
    }
    assert len(pooled) > 10
    assert [file for file in pooled if group(f"{file}::test_a") != "ranks"] == []
    assert (
        group("tests/e2e/test_vault.py::test_a") == "run" == group("tests/e2e/test_b.py::test_b[x]")
    )

    monkeypatch.setenv("PYTHONPATH", str(REPO))
    hooks = "pytest_addoption, pytest_configure, pytest_xdist_make_scheduler"
    suite.makeconftest(f"from tests.helpers.tiers import {hooks}")
    suite.makepyfile(test_other=SUITE)
    names = [path.name for path in suite.path.glob("test_*.py")]
    run = suite.runpytest_subprocess("-n", "2", "-v", "-p", "no:cacheprovider")
    for name in names:  # every file in one worker
        workers = re.findall(rf"\[(gw\d)\].*PASSED {name}::", run.stdout.str())
        assert len(workers) == 21
        assert len(set(workers)) == 1


def test_ci_runs_what_the_readme_says_and_one_slice() -> None:
    """CI runs the README's `make test`, then a part of the tests that it omits."""
    script = (REPO / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"make --no-print-directory ([\w-]+)", script) == ["test", "test-nightly"]
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    recipe = dict(re.findall(r"^(test|test-nightly):.*\n\t(.*)", makefile, re.MULTILINE))
    assert "-m 'not nightly'" in recipe["test"]
    assert "-m 'nightly and not image'" in recipe["test-nightly"]
