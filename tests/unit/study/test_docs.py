"""The study in docs/ is what the program makes of its results."""

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
