"""The audit of real releases by its command: a public seed fails it, the default passes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MainRun
from tests.helpers.commands import Done, call, error_of, ok, run

pytestmark = pytest.mark.e2e

FIELDS = {
    "attack",
    "needs",
    "verdict",
    "auc",
    "auc_outside_embeddings",
    "iou",
    "chance_iou",
    "preventable",
    "countermeasure",
    "note",
    "seconds",
}


def audit(work: Path, name: str, *more: str | Path) -> tuple[Done, dict[str, Any]]:
    """Return the result of the command, and the attacks of its audit.json by name."""
    folder = work / "runs" / name
    done = call(
        "audit.py",
        "--release",
        folder / "release",
        "--ticket",
        folder / "private" / "ticket",
        "--config",
        folder / "config.yaml",
        "--seconds",
        "20",
        "--seeds",
        "40:60",
        *more,
        cwd=work,
    )
    found = json.loads((folder / "private" / "audit" / "audit.json").read_text())
    return done, {row["attack"]: row for row in found["attacks"]} | {"whole": found}


@pytest.fixture(scope="module")
def public(work: Path) -> Path:
    ok(
        run(
            "pretrain.py",
            "--config",
            "tiny.yaml",
            "--run.name",
            "public",
            "--init.seed",
            "42",
            "--train.micro_batch_size",
            "8",
            "--deepspeed-config",
            "zero0.json",
            cwd=work,
        )
    )
    ok(call("export.py", "--run", "runs/public", "--allow-public-mask", cwd=work))
    return work


@pytest.mark.nightly
def test_public_seed_fails(public: Path):
    done, found = audit(public, "public", "--text", "store")
    assert done.returncode == 1, done.stderr
    for name in ("seed replay", "seed brute force"):
        assert found[name]["verdict"] == "leak"
        assert found[name]["iou"] >= 0.99
    assert "seed 42 found after 3" in found["seed brute force"]["note"]
    again = found["rerun discovery, same seed"]
    assert again["verdict"] == "leak"
    assert again["iou"] > 0.98 > found["rerun discovery, other seed"]["iou"]
    assert found["whole"]["leaks"][:2] == ["seed replay", "seed brute force"]
    assert "leak that can be prevented: seed replay, seed brute force" in done.stderr
    assert "LEAK" in done.stdout


def test_default_passes(main_run: MainRun, work: Path):
    done, found = audit(work, "main")
    ok(done)
    for name in ("seed replay", "seed brute force"):
        assert found[name]["verdict"] == "chance"
        assert abs(found[name]["iou"] - found[name]["chance_iou"]) < 0.01
        assert abs(found[name]["chance_iou"] - 0.538) < 0.01
    for name, flag in (("shadow model", "--shadow"), ("gradients", "--text")):
        assert (found[name]["verdict"], found[name]["note"]) == ("not run", f"needs {flag}")
    whole = found.pop("whole")
    assert (whole["format_version"], whole["leaks"], whole["with_ticket"]) == (1, [], True)
    assert all(set(row) == FIELDS for row in found.values())
    folder = main_run.run.private / "audit"
    assert {path.name for path in folder.iterdir()} == {"audit.json", "audit.png"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in [folder, *folder.iterdir()])
    shutil.rmtree(folder)


@pytest.mark.nightly
def test_second_revision_and_shadow(main_run: MainRun, public: Path):
    """Attack with another checkpoint of the run, and the attacker's own run."""
    older = ("--checkpoint", "30", "--out", "older", "--private")
    ok(call("export.py", "--run", "runs/main", *older, cwd=public))
    done, found = audit(public, "main", "--base", "older", "--shadow", "runs/public")
    assert done.returncode == 1
    assert found["whole"]["leaks"] == ["difference with a known base"]
    assert found["difference with a known base"]["auc"] > 0.9
    assert found["shadow model"]["verdict"] == "open"
    shutil.rmtree(main_run.run.private / "audit")


@pytest.mark.nightly
def test_without_the_ticket(main_run: MainRun, public: Path):
    done = call(
        "audit.py",
        "--release",
        "runs/public/release",
        "--seeds",
        "0:1",
        "--out",
        "seen/by/others",
        cwd=public,
    )
    assert done.returncode == 1  # 42 is a usual seed
    found = json.loads((public / "seen/by/others/audit.json").read_text())
    verdicts = {row["attack"]: row["verdict"] for row in found["attacks"]}
    assert verdicts["seed replay"] == "leak"
    assert verdicts["magnitudes"] == "no answer"
    assert not found["with_ticket"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--release", "nowhere"], "--release nowhere does not exist"),
        (["--release", "store"], "store is not a model: it has no config.json"),
        (["--release", "store", "--seeds", "5:2"], "--seeds 5:2 is not FIRST:END"),
        (["--release", "store", "--seeds", "0:4294967297"], "uses 32 bits"),
        (["--release", "store", "--seconds", "0"], "--seconds 0.0 must be positive"),
        (["--release", "store", "--out", "store/audit"], "is inside --release store"),
        (["--release", "store", "--ticket", "corpus.jsonl"], "no ticket at .: ticket.json"),
        (["--release", "store", "--config", "corpus.jsonl"], "--config corpus.jsonl"),
    ],
)
def test_mistakes(work: Path, arguments: list[str], message: str):
    assert message in error_of(call("audit.py", *arguments, cwd=work))
