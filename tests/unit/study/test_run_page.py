"""The page of one run, from its records alone."""

import base64
import re
from pathlib import Path

import pytest

from pmp_ds.errors import UserError
from pmp_ds.log import begin, read_metrics
from pmp_ds.log.writer import MetricsLog
from pmp_ds.run_dir import RunDir
from pmp_ds.study import run_page, run_plan
from pmp_ds.train.planned import Plan, Started
from tests.unit.study.test_collect import finished


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Return a run of three starts: one killed after update 2, one stopped, one that ended."""
    run = finished(tmp_path / "run", done=0)
    run.metrics.unlink()
    starts: list[tuple[dict[str, int], tuple[int, ...], int | None]] = [
        ({}, (0, 1, 2), None),
        ({"train": 1}, (2, 3), 75),
        ({"train": 3}, (4,), 0),
    ]
    for resumed, steps, code in starts:
        begin(run.metrics, resumed)
        log = MetricsLog(run, enabled=True)
        for step in steps:
            log.write("train", step, loss=5.0, tokens_per_second=1000.0 * step, save_seconds=2.5)
        log.close(code)
    return run


def cells(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows]


def test_by_hand(run: RunDir) -> None:
    path = run_page.write(run, "run", {"ticket": "k = 7 <b>"})
    text = path.read_text()
    assert path == run.root / "report.html"
    assert ["ticket", "k = 7 &lt;b&gt;"] in cells(text)
    assert "3 starts, of which 1 ended by a fault." in text
    ends = [(row[0], row[2], row[3], row[5]) for row in cells(text) if len(row) == 6]
    assert ends == [
        ("1", "the beginning", "update 2", "none recorded: killed, or a fault"),
        ("2", "update 1", "update 3", "stopped on request"),
        ("3", "update 3", "update 4", "done"),
    ]
    # Of the valid records 0, 1, 2, 3, 4.
    assert ["tokens per second", "2,000", "0", "4,000"] in cells(text)
    assert len(read_metrics(run.metrics)) == 5


PLAN = Plan(
    started=Started(
        ranks=2, device="cuda", micro_batch_size=1, deepspeed={}, host_memory_before=10
    ),
    updates=5,
    tokens=100,
    device_memory=50,
    host_memory=40,
    has_activations=False,
    checkpoint=800,
    release=400,
)


def test_the_plan_beside_what_was_measured(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_plan, "plan_of", lambda run: PLAN)
    run.release.mkdir(exist_ok=True)
    for path in run.release.iterdir():
        path.unlink()
    (run.release / "model.safetensors").write_bytes(bytes(300))
    text = run_page.write(run, "run", {}).read_text()
    assert "on 2 ranks (cuda)" in text
    assert "Activations are left out" in text
    assert [row for row in cells(text) if len(row) == 4][:6] == [
        ["updates", "5", "4", "0.80"],
        ["tokens", "100", "none yet", "-"],
        ["host memory, bytes", "40", "none yet", "-"],
        ["a checkpoint, bytes", "800", "none yet", "-"],
        ["weights of the release, bytes", "400", "300", "0.75"],
        ["device memory in an update, bytes", "50", "none yet", "-"],
    ]


def test_memory_is_that_of_the_last_start(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have other ranks than the one before."""
    monkeypatch.setattr(run_plan, "plan_of", lambda run: PLAN)
    first = {"phase": "train", "step": 1, "start": 1, "tokens": 20}
    first |= {"peak_host_memory": 160.0, "peak_memory_allocated": 400.0}
    second = {"phase": "train", "step": 2, "start": 2, "tokens": 40}
    second |= {"peak_host_memory": 20.0, "peak_memory_allocated": 50.0}
    found = {row[0]: row[2] for row in run_plan.table(run, [first, second]).rows}
    assert found["tokens"] == "40"
    assert found["host memory, bytes"] == "20"
    assert found["device memory in an update, bytes"] == "50"
    begun = {"phase": "start", "step": 2, "start": 3}
    found = {row[0]: row[2] for row in run_plan.table(run, [first, second, begun]).rows}
    assert found["host memory, bytes"] == "none yet"


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"ranks": "many"}', '{"ranks": 2}'])
def test_a_start_of_which_nothing_is_known(run: RunDir, content: str | None) -> None:
    if content is not None:
        run.machine.write_text(content)
    text = run_page.write(run, "run", {}).read_text()
    assert "Nothing is known of its last start" in text


def test_it_needs_nothing_beside_it(run: RunDir) -> None:
    text = run_page.write(run, "run", {}).read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(one)[:8] for one in pictures] == [b"\x89PNG\r\n\x1a\n"] * 2
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert not list(run.root.glob("*.incomplete"))


def test_a_run_of_an_older_version(run: RunDir) -> None:
    """Its records have neither start nor time."""
    run.metrics.write_text('{"phase": "train", "step": 1, "loss": 5.0}\n')
    text = run_page.write(run, "run", {}).read_text()
    assert "1 start, of which 0 ended by a fault." in text
    assert cells(text)[-1][:5] == ["1", "unknown", "the beginning", "update 1", "unknown"]


def test_a_folder_in_the_way_is_named(run: RunDir) -> None:
    run.report.mkdir()
    with pytest.raises(UserError, match=r"report\.html cannot be written: "):
        run_page.write(run, "run", {})
