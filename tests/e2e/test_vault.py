"""A ticket goes to a partner: sealed, opened elsewhere, trained with, traced when it leaks."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pmp_ds.commands import vault
from pmp_ds.model.parameters import weights_digest
from pmp_ds.run_dir import RunDir
from pmp_ds.ticket.keys import identities, new_identity
from pmp_ds.ticket.vault import open_sealed
from tests.e2e.conftest import MainRun
from tests.helpers import tiny
from tests.helpers.commands import call, error_of, files_of, ok
from tests.helpers.distributed import REPO
from tests.helpers.faults import seen
from tests.helpers.forks import command
from tests.helpers.glue import write_glue

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def partner(main_run: MainRun, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the partner's machine: a key of their own, the release and the sealed file only."""
    home = tmp_path_factory.mktemp("partner")
    public = ok(call("vault.py", "keygen", "--out", "key.txt", cwd=home)).stdout
    (work / "a.pub").write_text(public)
    ok(
        call(
            "vault.py",
            "seal",
            "--run",
            "runs/main",
            "--name",
            "Partner A",
            "--to",
            "a.pub",
            "--out",
            "a.age",
            cwd=work,
        )
    )
    vault.main(
        [
            "seal",
            "--run",
            str(main_run.run.root),
            "--name",
            "Partner B",
            "--to",
            new_identity(work / "b.key"),
            "--out",
            str(work / "b.age"),
        ]
    )
    (work / "a.age").rename(home / "partner-a.age")
    shutil.copytree(main_run.run.release, home / "release")
    return home


@pytest.fixture(scope="module")
def tuned(partner: Path) -> Path:
    """Run the code of docs/VAULT.md unchanged, in a process of the partner's own."""
    text = (REPO / "docs" / "VAULT.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    batches = "batches = torch.arange(8 * 4 * 32).mul(7919).remainder(300).view(8, 4, 32)\n"
    done = subprocess.run(
        [sys.executable, "-c", f"import torch\n{batches}{code}"],
        cwd=partner,
        timeout=200,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return partner / "tuned"


def test_a_partner_trains_the_ticket_alone(partner: Path, tuned: Path):
    mask = open_sealed(partner / "partner-a.age", identities(partner / "key.txt")).mask
    before = load_file(partner / "release" / "model.safetensors")
    after = load_file(tuned / "model.safetensors")
    assert before.keys() == after.keys() == mask.shapes.keys()
    for name, weight in after.items():
        kept, old = mask.full(name), before[name].to(weight.dtype)
        assert torch.equal(weight[~kept], old[~kept]), "the complement changed"
        assert not torch.equal(weight[kept], old[kept])


def test_one_command_of_the_partner(partner: Path):
    """Run the command of docs/VAULT.md on two ranks: only ticket and head change."""
    write_glue(partner / "glue")
    done = ok(
        command(
            "finetune.py",
            "--model",
            "release",
            "--task",
            "sst2",
            "--method",
            "ticket",
            "--ticket",
            "partner-a.age",
            "--identity",
            "key.txt",
            "--data.glue_dir",
            "glue",
            "--train.lr",
            "1e-3",
            cwd=partner,
            ranks=2,
        )
    )
    assert "SST-2 accuracy" in done.stdout
    assert "majority 0.500" in done.stdout
    mask = open_sealed(partner / "partner-a.age", identities(partner / "key.txt")).mask
    before = load_file(partner / "release" / "model.safetensors")
    after = load_file(partner / "runs/finetune/private/model/model.safetensors")
    assert set(after) - set(before) == {"score.weight"}
    for name in set(after) & set(before):
        kept, old = mask.full(name), before[name].float()
        assert torch.equal(after[name][~kept], old[~kept]), "the complement changed"
        assert not torch.equal(after[name][kept], old[kept])
    again = ok(command("finetune.py", "--config", "runs/finetune/config.yaml", cwd=partner))
    assert "cells     1, of which 1 are finished" in again.stdout


def test_a_leak_names_its_recipient(main_run: MainRun, work: Path, partner: Path, tuned: Path):
    ok(
        call(
            "vault.py",
            "open",
            "partner-a.age",
            "--identity",
            "key.txt",
            "--out",
            "ticket",
            cwd=partner,
        )
    )
    fits = ok(call("vault.py", "verify", "ticket", "--model", "release", cwd=partner))
    assert "same names and shapes" in fits.stdout
    shown = [
        ok(call("vault.py", "show", *what, cwd=partner)).stdout
        for what in (("ticket",), ("partner-a.age", "--identity", "key.txt"))
    ]
    assert shown[0] == shown[1]
    assert "self_attn.q_proj.weight" in shown[0]
    told = ok(call("vault.py", "trace", "--run", "runs/main", "--model", tuned, cwd=work)).stdout
    verdicts = re.findall("^verdict: .*", told, re.MULTILINE)
    assert len(verdicts) == 1
    assert verdicts[0].startswith("verdict: the copy of Partner A."), told
    assert main_run.run.vault.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def copied(main_run: MainRun, tmp_path: Path) -> RunDir:
    """Return a copy of the run without its vault, and a public key next to it."""
    run = RunDir(Path(shutil.copytree(main_run.run.root, tmp_path / "main")))
    shutil.rmtree(run.vault, ignore_errors=True)
    (tmp_path / "a.pub").write_text(new_identity(tmp_path / "a.key"))
    return run


SEAL = ("vault.py", "seal", "--run", "main", "--name", "A", "--to", "a.pub", "--out", "a.age")


@pytest.mark.parametrize(
    ("fault", "lost"), [("lost key, seal", True), ("key, seal", False)], ids=["lost", "damaged"]
)
def test_no_copy_is_sealed_with_another_key(copied: RunDir, tmp_path: Path, fault: str, lost: bool):
    """Such a copy could not be traced. The weights outside the ticket cannot be exported either."""
    key = copied.init / "key"
    if lost:
        key.unlink()
    else:
        key.write_bytes(key.read_bytes()[:-1] + b"x")
    before = files_of(tmp_path)
    done = call(*SEAL, cwd=tmp_path)
    seen(fault, done.returncode, error_of(done))
    done = call("export.py", "--run", "main", "--checkpoint", "init", "--out", "out", cwd=tmp_path)
    seen(fault, done.returncode, error_of(done))
    assert files_of(tmp_path) == before


def test_key_of_a_run_of_an_older_version(copied: RunDir, tmp_path: Path):
    """Without a check value of the key in theta0.json, theta(0) is drawn again."""
    path, key = copied.init / "theta0.json", copied.init / "key"
    path.write_text(json.dumps({"sha256": weights_digest(tiny.at_theta0(copied))}))
    right = key.read_bytes()
    key.write_bytes(right[:-1] + b"x")
    assert "theta(0) drawn again differs from the one" in error_of(call(*SEAL, cwd=tmp_path))
    assert not copied.vault.exists()
    key.write_bytes(right)
    ok(call(*SEAL, cwd=tmp_path))
    path.unlink()
    other = (*SEAL[:-1], "b.age")
    assert "theta0.json is missing or damaged" in error_of(call(*other, cwd=tmp_path))


@pytest.mark.parametrize("version", [2, 5])
def test_a_digest_of_other_initial_weights(copied: RunDir, tmp_path: Path, version: int):
    """Under another lineage a second revision could be released; version 2 has no seal to check."""
    path = copied.init / "theta0.json"
    values = json.loads(path.read_text())
    assert values["format_version"] == 5
    values["sha256"] = "0" * 64
    if version == 2:
        values["format_version"] = 2
        del values["seal"]
    path.write_text(json.dumps(values))
    before = files_of(tmp_path)
    message = error_of(call("export.py", "--run", "main", "--out", "again", cwd=tmp_path))
    if version == 5:
        seen("altered digest", 1, message)
    else:
        assert "theta(0) drawn again differs from the one" in message
    assert files_of(tmp_path) == before


@pytest.mark.usefixtures("reloaded_here")
def test_no_ledger_beside_a_release(copied: RunDir, tmp_path: Path):
    """Losing the ledger file does not erase earlier releases."""
    copied.ledger.unlink()
    before = files_of(tmp_path)
    export = ("export.py", "--run", "main", "--out", "again")
    message = error_of(call(*export, cwd=tmp_path))
    assert "main/private/ledger.jsonl is missing, and main/release has left" in message
    assert files_of(tmp_path) == before
    ok(call(*export, "--another-revision", "the ledger burnt", cwd=tmp_path))
