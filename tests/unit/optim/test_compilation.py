"""Where the C++ operators are compiled and found, and what is said where they are not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmp_ds.optim.kernels import cpu
from tests.helpers.distributed import REPO

needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
ASK = """
import sys
from pathlib import Path
from pmp_ds.optim.kernels import cpu
if len(sys.argv) > 1:
    cpu.SOURCE = Path(sys.argv[1])
    if len(sys.argv) > 2:
        print(cpu.compile_beside_source())
loaded = cpu.library()
print(loaded and loaded._name)
"""


def ask(*words: str | Path, **environment: str) -> tuple[str, str]:
    """The path of what a fresh process loads, or `None`, and its warnings."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *map(str, words)], cwd=REPO, env=os.environ | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()[-1], done.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy, whose folder may be written to."""
    path = tmp_path / "package" / cpu.SOURCE.name
    path.parent.mkdir()
    path.write_bytes(cpu.SOURCE.read_bytes())
    return path


def test_a_missing_source_is_not_the_compilers_fault(tmp_path: Path):
    loaded, warning = ask(tmp_path / "masked_adamw.cpp")
    assert loaded == "None"
    assert f"{tmp_path / 'masked_adamw.cpp'} is missing" in warning
    assert "install it again" in warning
    assert "g++" not in warning


@needs_compiler
def test_in_the_users_cache(tmp_path: Path):
    loaded, warning = ask(XDG_CACHE_HOME=str(tmp_path))
    assert Path(loaded).parent == tmp_path / "pmp_ds"
    assert warning == ""


@needs_compiler
@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_a_cache_that_cannot_be_written_to(tmp_path: Path, variable: str):
    """As HOME=/ under `docker run --user 12345`."""
    (tmp_path / "file").write_text("")
    environment = {"XDG_CACHE_HOME": "", variable: str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    loaded, warning = ask(**environment)
    assert Path(loaded).parent == tmp_path / f"pmp_ds-{os.getuid()}"
    assert warning == ""
    assert ask(**environment) == (loaded, "")


@needs_compiler
def test_beside_the_source(source: Path, tmp_path: Path):
    """As in an image: nothing is compiled at run time, no cache is needed."""
    loaded, _ = ask(source, "build")
    assert Path(loaded).parent == source.parent
    nowhere = str(tmp_path / "cache")
    assert ask(source, XDG_CACHE_HOME=nowhere) == (loaded, "")
    assert not Path(nowhere).exists()


@needs_compiler
def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path):
    loaded, _ = ask(XDG_CACHE_HOME=str(tmp_path))
    Path(loaded).write_bytes(b"")
    answer, warning = ask(XDG_CACHE_HOME=str(tmp_path))
    assert answer == "None"
    assert f"{loaded} cannot be loaded" in warning
    assert "g++" not in warning


def test_a_compiler_that_does_not_compile_is_quoted(source: Path, tmp_path: Path):
    source.write_text("nonsense;")
    answer, warning = ask(source, XDG_CACHE_HOME=str(tmp_path))
    assert answer == "None"
    assert "failed: " in warning or "no C++ compiler" in warning


def test_a_compiler_that_is_not_there(tmp_path: Path):
    _, warning = ask(CXX=str(tmp_path / "c++"))
    assert "the C++ operators could not be compiled: " in warning
    assert str(tmp_path / "c++") in warning
