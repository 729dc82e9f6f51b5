"""The file for node_exporter's textfile collector."""

import math
import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pmp_ds.config import Config, MaskConfig, RunConfig, TrainConfig
from pmp_ds.errors import UserError
from pmp_ds.log import begin, textfile
from pmp_ds.log.textfile import Textfile, check_folder
from pmp_ds.log.writer import MetricsLog
from pmp_ds.run_dir import RunDir, sweep
from tests.helpers.distributed import REPO
from tests.helpers.exposition import parse

CONFIG = Config(
    run=RunConfig(name="x"),
    mask=MaskConfig(max_steps=50),
    train=TrainConfig(steps=12, warmup_steps=0),
)


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDir:
    monkeypatch.setattr(textfile, "SECONDS", 0.0)
    run = RunDir(tmp_path / "x")
    run.create()
    begin(run.metrics, {})
    return run


def opened(run: RunDir, config: Config = CONFIG) -> MetricsLog:
    return MetricsLog(run, enabled=True, sinks=lambda starts: [Textfile(run, config, starts)])


def values(path: Path, run: str = "x") -> dict[str, float]:
    """Return the samples of a run by name, without the prefix and those of the phases."""
    found = parse(path.read_text())
    return {
        name.removeprefix("pmp_ds_"): value
        for (name, labels), value in found.items()
        if labels == f'run="{run}"'
    }


def test_numbers_of_a_run(run):
    log = opened(run)
    before = values(run.textfile)
    assert (before["running"], before["starts_total"], before["faults_total"]) == (1, 1, 0)
    assert "update" not in before
    log.write("discover", 3, loss=7.5, iou=0.5)
    assert parse(run.textfile.read_text())["pmp_ds_phase", 'run="x",phase="discover"'] == 1
    assert values(run.textfile)["planned_updates"] == 50
    assert values(run.textfile)["mask_iou_ratio"] == 0.5
    log.write("train", 0, val_loss=7.0)
    log.write("train", 8, loss=6.5, lr=1e-05, tokens=4096.0, tokens_per_second=1e9, mfu=0.5)
    log.write("train", 8, save_stall_seconds=0.25, save_seconds=2.5)
    found = values(run.textfile)
    assert parse(run.textfile.read_text())["pmp_ds_phase", 'run="x",phase="discover"'] == 0
    assert "mask_iou_ratio" not in found
    expected = {
        "update": 8,
        "planned_updates": 12,
        "loss": 6.5,
        "validation_loss": 7.0,
        "learning_rate": 1e-05,
        "tokens": 4096,
        "tokens_per_second": 1e9,
        "model_flops_ratio": 0.5,
        "last_save_duration_seconds": 2.5,
        "last_save_stall_seconds": 0.25,
        "last_save_timestamp_seconds": found["last_update_timestamp_seconds"],
        "running": 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert "exit_code" not in found
    log.close(75)
    assert values(run.textfile)["running"] == 0
    assert values(run.textfile)["exit_code"] == 75
    assert values(run.textfile)["faults_total"] == 0


def test_starts_and_faults(run):
    opened(run).close(None)
    assert values(run.textfile)["faults_total"] == 1
    assert "exit_code" not in values(run.textfile)
    begin(run.metrics, {"train": 3})
    opened(run)
    found = values(run.textfile)
    assert (found["starts_total"], found["faults_total"]) == (2, 1)
    assert found["start_timestamp_seconds"] == pytest.approx(os.stat(run.metrics).st_mtime, abs=60)


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, "NaN"), (math.inf, "+Inf"), (-math.inf, "-Inf")]
)
def test_not_finite(run, value, text):
    opened(run).write("train", 1, loss=value)
    assert f'pmp_ds_loss{{run="x"}} {text}\n' in run.textfile.read_text()
    parse(run.textfile.read_text())


def test_folder_of_the_setting(run, tmp_path):
    """A name with quotation marks is a label of that name."""
    folder = tmp_path / "collector"
    folder.mkdir()
    name = 'a "b" \\c'
    config = replace(CONFIG, run=RunConfig(name=name, prometheus=str(folder)))
    check_folder(config.run)
    opened(run, config)
    assert [path.name for path in folder.iterdir()] == [f"{name}.prom"]
    assert values(folder / f"{name}.prom", 'a \\"b\\" \\\\c')["running"] == 1
    assert not run.textfile.exists()


def test_folder_that_is_missing(tmp_path):
    config = replace(CONFIG, run=RunConfig(prometheus=str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"run\.prometheus=.*none is not a folder"):
        check_folder(config.run)


def test_a_lost_folder_warns_once_and_stops_nothing(run, tmp_path, capsys):
    folder = tmp_path / "collector"
    folder.mkdir()
    log = opened(run, replace(CONFIG, run=RunConfig(name="x", prometheus=str(folder))))
    (folder / "x.prom").unlink()
    folder.rmdir()
    log.write("train", 1, loss=1.0)
    log.write("train", 2, loss=1.0)
    log.close()
    assert capsys.readouterr().err.count("warning: ") == 1
    assert run.metrics.read_text().count('"loss"') == 2


def test_not_more_often_than_needed(run, monkeypatch):
    monkeypatch.setattr(textfile, "SECONDS", 3600.0)
    log = opened(run)
    log.write("train", 1, loss=1.0)
    log.write("train", 2, loss=1.0)
    assert "update" not in values(run.textfile)
    log.close()
    assert values(run.textfile)["update"] == 2


def test_readers_see_whole_files(run):
    """A reader in a tight loop never sees an empty or partial file."""
    log = opened(run)
    over = threading.Event()
    seen = []

    def read() -> None:
        while not over.is_set():
            seen.append(run.textfile.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 300):
        log.write("train", step, loss=1.0)
    over.set()
    reader.join()
    assert len(set(seen)) > 10
    for text in set(seen):
        parse(text)


def test_leftovers_of_a_kill_are_swept(run):
    left = run.root / ".metrics.prom.incomplete"
    left.write_text("half")
    opened(run)
    left.write_text("half")
    sweep(run)
    assert not left.exists()


def test_alert_rules_name_what_exists():
    """docs/alerts.yaml uses only our metrics, and each rule says which run."""
    rules = yaml.safe_load((REPO / "docs/alerts.yaml").read_text())["groups"][0]["rules"]
    for rule in rules:
        names = set(re.findall(r"\bpmp_ds_\w+", rule["expr"]))
        assert names
        assert names <= {f"pmp_ds_{name}" for name in textfile._HELP}, rule["alert"]
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]


def test_progress_is_missed_from_the_start(run):
    """The file of a new start has a time that the rule for missing progress counts from."""
    opened(run)
    rules = yaml.safe_load((REPO / "docs/alerts.yaml").read_text())["groups"][0]["rules"]
    (rule,) = (rule for rule in rules if rule["alert"] == "PmpDsNoProgress")
    (times,) = re.findall(r"time\(\) - \((.*?)\)", rule["expr"])
    assert {name.removeprefix("pmp_ds_") for name in times.split(" or ")} & set(
        values(run.textfile)
    )
