"""What is printed reaches any terminal, and a printed command can be pasted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pmp_ds.commands import prepare_data
from pmp_ds.prepare.summary import PrepareSummary

pytestmark = pytest.mark.processes

REPO = Path(__file__).resolve().parents[2]

SCRIPT = """
from pmp_ds.errors import UserError, exit_code
def main():
    print("caf\\u00e9 \\u4e2d \\udcff")
    raise UserError("input \\u4e2d\\udcff.txt does not exist")
raise SystemExit(exit_code(main))
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal(encoding: str):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        check=False,
        cwd=REPO,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 1
    chinese = "\u4e2d".encode(encoding, "backslashreplace")
    assert chinese in done.stdout
    assert done.stderr.strip() == b"error: input " + chinese + b"\\udcff.txt does not exist"


def test_a_printed_command_can_be_pasted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = "my data/it's"
    summary = PrepareSummary(folder=Path(folder), reused=True, manifest={})
    monkeypatch.setattr(PrepareSummary, "__str__", lambda self: "")
    prepare_data._report(summary)
    words = shlex.split(capsys.readouterr().out.partition("with ")[2])
    assert words == ["--data.store", folder]


def test_no_printed_command_has_a_bare_path():
    """Every `pmp-ds VERB ... {path}` in a message quotes the path."""
    bare = []
    for path in sorted((REPO / "pmp_ds").rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            command, _, rest = line.partition("pmp-ds ")
            if rest[:1].isalpha() and "{" in rest and "quoted(" not in rest and 'f"' in command:
                bare.append(f"{path.relative_to(REPO)}:{number}: {line.strip()}")
    assert bare == []
