"""The study in docs/ is what the program makes from its results."""

import json
from pathlib import Path

import pytest

from pmp_ds.commands import report, study

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


def test_recipe_in_the_documents_plans_what_the_results_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    results = (REPO / "docs/study/results.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in results]
    monkeypatch.chdir(REPO)
    study.main(["--config", "docs/study/recipe.yaml", "--plan"])
    expected = f"{kinds.count('pretrain')} models, {kinds.count('finetune')} fine-tunings"
    assert expected in capsys.readouterr().out
