"""What belongs to another user is a mistake in one line, not a fault that a scheduler repeats."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmp_ds.run_dir import RunDir
from tests.helpers.distributed import REPO
from tests.pretend.job import write_store

pytestmark = pytest.mark.processes

OTHER = 65534
CONFINED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""Starts a program for which root is a user like others."""

HOLD = """
import sys
from pathlib import Path
from pmp_ds import lease
from pmp_ds.errors import exit_code
def main():
    with lease.hold(Path(sys.argv[1]), "the run x"):
        print("held")
sys.exit(exit_code(main))
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    """A run whose private folder is closed to the commands below."""
    run = RunDir(tmp_path / "runs" / "x")
    run.create()
    run.config.write_text("{}\n")
    if os.geteuid() == 0:
        os.chown(run.private, OTHER, OTHER)
    else:
        run.private.chmod(0)
    yield run
    run.private.chmod(0o700)


def start(*words: str) -> tuple[int, str]:
    """Return exit code and standard error of a Python program."""
    before = CONFINED if os.geteuid() == 0 else []
    if before and subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("root cannot be confined here: setpriv and CAP_SETPCAP are needed")
    done = subprocess.run(
        [*before, sys.executable, *words],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("verb", ["export", "pretrain", "hold"])
def test_one_line(run: RunDir, tmp_path: Path, verb: str):
    write_store(tmp_path / "store", vocab=512)
    words = {
        "export": ("-m", "pmp_ds.commands", "export", "--run", str(run.root)),
        "pretrain": (
            *("-m", "pmp_ds.commands", "pretrain"),
            *("--run.root", str(run.root.parent), "--run.name", "x"),
            *("--data.store", str(tmp_path / "store")),
        ),
        "hold": ("-c", HOLD, str(run.private)),
    }
    code, said = start(*words[verb])
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if "WARNING" not in line]
    assert line.startswith("error: ")
    assert "Permission denied" in line
    assert str(run.private) in line
