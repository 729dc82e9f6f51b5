"""Prometheus' own checker on what a run writes and on docs/alerts.yaml."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pmp_ds.log.textfile import text_of
from tests.helpers.distributed import REPO

PROMTOOL = shutil.which("promtool")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's package prometheus"),
]


def promtool(*words: str | Path, text: str = "") -> str:
    done = subprocess.run(
        [str(PROMTOOL), *map(str, words)], input=text, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def test_numbers() -> None:
    values = {"loss": 1e-7, "starts_total": 2.0, "running": 1.0, "last_save_duration_seconds": 3.0}
    text = text_of('a "b"', "train", values, {"train": 12})
    assert promtool("check", "metrics", text=text) == ""


RUNS = {"pmp_ds_running": "1x400"}
RULES = REPO / "docs/alerts.yaml"
FRESH = RUNS | {"pmp_ds_start_timestamp_seconds": "0x400"}  # without an update
STALE = {"pmp_ds_running": "1x100", "pmp_ds_last_update_timestamp_seconds": "0+60x10 600x90"}


@pytest.mark.parametrize(
    ("series", "alert", "minute", "fires"),
    [
        (STALE, "PmpDsNoProgress", 30, False),
        (STALE, "PmpDsNoProgress", 60, True),
        (STALE | {"pmp_ds_running": "1x10 0x90"}, "PmpDsNoProgress", 60, False),
        (FRESH, "PmpDsNoProgress", 20, False),
        (FRESH, "PmpDsNoProgress", 40, True),
        (
            FRESH | {"pmp_ds_last_update_timestamp_seconds": "0+60x400"},
            "PmpDsNoProgress",
            40,
            False,
        ),
        ({"pmp_ds_running": "1x30 _x60"}, "PmpDsHostGone", 30, False),
        ({"pmp_ds_running": "1x30 _x60"}, "PmpDsHostGone", 60, True),
        ({"pmp_ds_running": "1x30 0 _x60"}, "PmpDsHostGone", 60, False),
        (RUNS, "PmpDsHostGone", 60, False),
        ({"pmp_ds_running": "1x5 0x9"}, "PmpDsEndedBadly", 8, True),
        ({"pmp_ds_running": "0x9", "pmp_ds_exit_code": "1x9"}, "PmpDsEndedBadly", 8, True),
        ({"pmp_ds_running": "0x9", "pmp_ds_exit_code": "75x9"}, "PmpDsEndedBadly", 8, False),
        ({"pmp_ds_running": "0x9", "pmp_ds_exit_code": "0x9"}, "PmpDsEndedBadly", 8, False),
        ({"pmp_ds_faults_total": "0x10 1x10 3x60"}, "PmpDsFaults", 40, True),
        ({"pmp_ds_faults_total": "0x10 1x60"}, "PmpDsFaults", 40, False),
        ({"pmp_ds_loss": "2x5 NaN NaN NaN"}, "PmpDsLossNotFinite", 8, True),
        ({"pmp_ds_loss": "2x5 Inf Inf Inf"}, "PmpDsLossNotFinite", 8, True),
        ({"pmp_ds_loss": "2x20"}, "PmpDsLossNotFinite", 8, False),
        ({"pmp_ds_tokens_per_second": "100x60 60x30"}, "PmpDsSlow", 80, True),
        ({"pmp_ds_tokens_per_second": "100x60 90x30"}, "PmpDsSlow", 80, False),
        (FRESH, "PmpDsNoCheckpoint", 300, True),
        (
            RUNS | {"pmp_ds_last_save_timestamp_seconds": "0+60x400"},
            "PmpDsNoCheckpoint",
            300,
            False,
        ),
        ({"pmp_ds_loader_ratio": "0.5x40"}, "PmpDsWaitsForData", 30, True),
    ],
)
def test_alerts(
    tmp_path: Path, series: dict[str, str], alert: str, minute: int, fires: bool
) -> None:
    """Each rule, on series of values by the minute."""
    rules: Any = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    rule = next(rule for rule in rules if rule["alert"] == alert)
    summary = rule["annotations"]["summary"].replace("{{ $labels.run }}", "demo")
    expected = {"exp_labels": {"run": "demo", **rule["labels"]}}
    expected["exp_annotations"] = {"summary": summary}
    case = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": f'{name}{{run="demo"}}', "values": values}
                    for name, values in series.items()
                ],
                "alert_rule_test": [
                    {
                        "eval_time": f"{minute}m",
                        "alertname": alert,
                        "exp_alerts": [expected] if fires else [],
                    }
                ],
            }
        ],
    }
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(case))
    promtool("test", "rules", tmp_path / "case.yaml")
