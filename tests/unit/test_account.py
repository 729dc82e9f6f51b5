"""A user without a passwd entry gets a name and a home before anything asks for them."""

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pmp_ds import account
from tests.helpers.distributed import REPO
from tests.helpers.namespaces import needs

NOBODY = ("unshare", "-U", "--map-user=12345")
NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remove the name from the environment and the passwd file, and use a temporary folder."""
    for name in (*NAMES, "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return tmp_path


def test_name_and_home(nameless: Path):
    account.complete()
    assert os.environ["LOGNAME"] == os.environ["USER"] == f"uid{os.getuid()}"
    home = Path.home()
    assert home.parent == nameless
    assert home.stat().st_mode & 0o777 == 0o700
    account.complete()
    assert Path.home() == home


def test_what_is_known_stays(nameless: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("USER", "anna")
    monkeypatch.setenv("HOME", "/home/anna")
    account.complete()
    assert (os.environ["USER"], os.environ["HOME"]) == ("anna", "/home/anna")
    assert "LOGNAME" not in os.environ
    assert list(nameless.iterdir()) == []


@pytest.mark.parametrize("what", ["open", "link", "file"])
def test_a_folder_of_somebody_else_is_not_taken(nameless: Path, what: str):
    """Compiled programs are loaded from there."""
    planted, elsewhere = nameless / f"pmp_ds-{os.getuid()}", nameless / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if what == "open":
        planted.mkdir()
        planted.chmod(0o777)
    elif what == "link":
        planted.symlink_to(elsewhere)
    else:
        planted.write_text("")
    folder = account.temporary_folder()
    assert folder not in (planted, elsewhere)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []


@needs(*NOBODY[1:])
@pytest.mark.processes
def test_the_import_does_it():
    """This is not limited to the commands: a user's own program has torch's caches too."""
    program = "import os, pmp_ds, getpass; print(getpass.getuser(), os.path.expanduser('~'))"
    without = [word for name in (*NAMES, "HOME") for word in ("-u", name)]
    command = [*NOBODY, "env", *without, sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    name, home = done.stdout.split()
    assert name == "uid12345"
    assert Path(home).is_absolute()
