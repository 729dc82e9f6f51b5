"""What a run cannot be repeated without is sealed, lost and restored."""

import re
import shutil
from pathlib import Path

import pytest

from pmp_ds.commands import backup as backup_command
from pmp_ds.log import read_metrics
from pmp_ds.run_dir import RunDir, loose
from pmp_ds.state.manifest import listed
from pmp_ds.ticket.keys import new_identity
from tests.e2e.conftest import MainRun
from tests.helpers.commands import DS_CONFIGS, call, error_of, files_of, ok
from tests.helpers.forks import command
from tests.helpers.workdir import STEPS

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def sealed(main_run: MainRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the owner's folder: key.txt and run.age, a backup of the main run."""
    home = tmp_path_factory.mktemp("owner")
    public = new_identity(home / "key.txt")
    before = files_of(main_run.run.root)
    backup_command.main([str(main_run.run.root), "--to", public, "--out", str(home / "run.age")])
    assert files_of(main_run.run.root) == before
    assert files_of(home).keys() == {str(home), str(home / "key.txt"), str(home / "run.age")}
    assert loose(home / "run.age") == []
    return home


def test_nothing_can_be_read_without_the_key(main_run: MainRun, sealed: Path):
    content, run = (sealed / "run.age").read_bytes(), main_run.run
    for secret in ((run.init / "key").read_bytes(), b"safetensors", b"ledger", b"ticket"):
        assert secret not in content


@pytest.mark.usefixtures("reloaded_here")
def test_a_run_that_lost_its_secrets_is_released_as_before(
    main_run: MainRun, sealed: Path, tmp_path: Path
):
    run = RunDir(tmp_path / "main")
    shutil.copytree(main_run.run.root, run.root)
    shutil.rmtree(run.release)
    for path in (run.init, run.ticket, run.vault):
        shutil.rmtree(path, ignore_errors=True)
    run.ledger.unlink()
    export = ("export.py", "--run", str(run.root))
    assert "key is missing" in error_of(call(*export, cwd=tmp_path))
    restore = ("restore.py", str(sealed / "run.age"), "--identity", str(sealed / "key.txt"))
    ok(call(*restore, "--run", str(run.root), cwd=tmp_path))
    assert loose(run.private) == []
    ok(call(*export, cwd=tmp_path))
    assert contents(run.release) == contents(main_run.run.release)
    assert run.ledger.read_bytes().startswith(main_run.run.ledger.read_bytes())


@pytest.mark.nightly
def test_a_run_is_repeated_from_its_backup_alone(
    main_run: MainRun, sealed: Path, work: Path, tmp_path: Path
):
    """The same two ranks, from an empty folder: every file of the last checkpoint is the same."""
    restore = ("restore.py", str(sealed / "run.age"), "--identity", str(sealed / "key.txt"))
    run = RunDir(tmp_path / "main")
    ok(call(*restore, "--run", str(run.root), cwd=tmp_path))
    words = ["--config", str(run.config), "--run.root", str(tmp_path)]
    words += ["--deepspeed-config", str(DS_CONFIGS / "zero1.json")]
    ok(command("pretrain.py", *words, cwd=work, ranks=2))
    assert {record["phase"] for record in read_metrics(run.metrics)} == {"train"}
    first, second = (one.checkpoints / f"update-{STEPS:08d}" for one in (main_run.run, run))
    assert listed(second)[1] == listed(first)[1]


def contents(release: Path) -> dict[str, bytes]:
    """Return the files of a release; the day is left out of the card, and so is the card's sum."""
    found = {path.name: path.read_bytes() for path in release.iterdir()}
    found["README.md"] = re.sub(rb"20\d\d-\d\d-\d\d", b"DAY", found["README.md"])
    found["SHA256SUMS"] = re.sub(rb".* README\.md\n", b"", found["SHA256SUMS"])
    return found
