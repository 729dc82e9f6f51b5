"""One report of a whole study, drawn once."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pmp_ds.results import Result
from pmp_ds.study import report
from tests.helpers import study


def save(results: list[Result], folder: Path) -> Path:
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    return path


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results.jsonl, audit.json and report/, with a planted gap of 5 points."""
    folder = tmp_path_factory.mktemp("study")
    planted = study.study(gap=5.0, secret=2.0, tax=0.01, seeds=3)
    results = save([*planted, *study.sweeps(), *study.instruments()], folder)
    (folder / "audit.json").write_text(json.dumps(study.audit()))
    report.write(results, [folder / "audit.json"], folder / "report")
    return folder
