"""Settings of a measurement by the lm-eval harness, which need not be installed here."""

from pathlib import Path
from typing import Any

import pytest

from pmp_ds.evaluate import harness, jobs


def test_ones_own_tasks_are_told_apart_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "installed", lambda: "0.4.9")
    monkeypatch.setattr(harness, "task_manager", lambda tasks, folder: None)
    subject: Any = None

    def settings(folder: Path | None) -> dict[str, Any]:
        return next(jobs.lm_eval(subject, ["mine"], folder, None, 1)).settings

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/task.yaml").write_text("task: mine\n")
    before = settings(tmp_path)
    assert settings(tmp_path) == before
    (tmp_path / "mine/task.yaml").write_text("task: mine\nnum_fewshot: 3\n")
    assert settings(tmp_path) != before
    assert settings(None) == {"task": "mine", "limit": None, "lm_eval": "0.4.9"}
