"""Test a release with a client by trial.py, once for each release, client and trial.

    found, day = try_release(client, Path(".clients/releases/llama"), Path(".clients"))

`found` is the result of trial.py, with a line `error` if it ended early. It is stored next to the
release as CLIENT.json, so that a stopped run resumes; an unexpected result is tested again.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.clients.environments import Client, call, shown
from tests.clients.releases import TEXTS

TRIAL = Path(__file__).with_name("trial.py")
_SECONDS = 900  # of one trial
_QUIET = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def as_expected(found: dict[str, Any]) -> bool:
    """Return whether every text had the expected tokens and the logits are close."""
    equal = found.get("ids") == found.get("greedy") == len(TEXTS)
    return equal and found["logits"] <= 1e-2 and "error" not in found


def try_release(client: Client, folder: Path, home: Path) -> tuple[dict[str, Any], str]:
    """Return the client's result for ``folder``/release, and its date."""
    result = folder / f"{client.slug}.json"  # replaced together with the release
    inputs = (client.place(home) / "installed", TRIAL)
    newest = result.exists() and all(_time(result) > _time(each) for each in inputs)
    if not newest or not as_expected(_read(result)):
        _try(client, result, home)
    return _read(result), str(datetime.fromtimestamp(_time(result), UTC).date())


def _try(client: Client, result: Path, home: Path) -> None:
    result.unlink(missing_ok=True)
    python = client.place(home) / "bin/python"
    command = [str(python), str(TRIAL), client.trial, str(result.parent), str(result)]
    error = None
    with client.log(home).open("a", encoding="utf-8") as log:
        try:
            call(client, home, command, log, seconds=_SECONDS, environment=_QUIET)
        except RuntimeError as refusal:
            error = str(refusal)
    found = _read(result)
    if error is not None:
        found["error"] = shown(found.get("error", error))
    result.write_text(json.dumps(found), encoding="utf-8")


def _read(result: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it was killed before or during the write
        found = {"also": []}
    return found


def _time(file: Path) -> float:
    return file.stat().st_mtime
