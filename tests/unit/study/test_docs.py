"""The study in docs/ is what the program makes of its results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import report

REPO = Path(__file__).resolve().parents[3]


def test_report_in_the_documents_is_made_of_the_results_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(REPO)
    report.main(["--study", "docs/study", "--out", str(tmp_path)])
    kept = Path("docs/study")
    assert (tmp_path / "report.md").read_text() == (kept / "report.md").read_text()
    drawn = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {path.name for path in (kept / "figures").iterdir()}


@pytest.mark.processes
def test_recipe_in_the_documents_plans_what_the_results_hold():
    results = (REPO / "docs/study/results.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in results]
    command = "launcher/study.py", "--config", "docs/study/recipe.yaml", "--plan"
    done = subprocess.run(
        [sys.executable, *command], cwd=REPO, capture_output=True, text=True, check=True
    )
    expected = f"{kinds.count('pretrain')} models, {kinds.count('finetune')} fine-tunings"
    assert expected in done.stdout
