"""Where the C++ operators are compiled and found, and what is said where they are not."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pmp_ds.optim.kernels import compiler
from tests.helpers.distributed import REPO

pytestmark = pytest.mark.processes

needs_compiler = pytest.mark.skipif(compiler.library() is None, reason="no C++ compiler")
ASK = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("compiler", "pmp_ds/optim/kernels/compiler.py")
compiler = importlib.util.module_from_spec(spec)  # by its path: the package imports torch, seconds
spec.loader.exec_module(compiler)
if len(sys.argv) > 1:
    compiler.SOURCE = Path(sys.argv[1])
    if len(sys.argv) > 2:
        print(compiler.compile_beside_source())
loaded = compiler.library()
print(loaded and loaded._name)
"""


def ask(*words: str | Path, **environment: str) -> tuple[str, str]:
    """The path of what a fresh process loads, or `None`, and its warnings."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *map(str, words)],
        cwd=REPO,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1], done.stderr


@pytest.fixture
def _compiled_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler, which hands out what it made of the same source before: 5 s less a test."""
    real, made = compiler._compiler(), compiler.library()
    assert real is not None
    assert made is not None
    script = tmp_path / "c++"
    script.write_text(
        f'#!/bin/bash\n[ "$1" = --version ] && exec {shlex.quote(real)} "$@"\n'
        f'cp {shlex.quote(made._name)} "${{@: -1}}"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy, whose folder may be written to."""
    path = tmp_path / "package" / compiler.SOURCE.name
    path.parent.mkdir()
    path.write_bytes(compiler.SOURCE.read_bytes())
    return path


def test_a_missing_source_is_not_the_compilers_fault(tmp_path: Path):
    loaded, warning = ask(tmp_path / "masked_adamw.cpp")
    assert loaded == "None"
    assert f"{tmp_path / 'masked_adamw.cpp'} is missing" in warning
    assert "reinstall it" in warning
    assert "g++" not in warning


@needs_compiler
def test_in_the_users_cache(tmp_path: Path):
    loaded, warning = ask(XDG_CACHE_HOME=str(tmp_path))
    assert Path(loaded).parent == tmp_path / "pmp_ds"
    assert warning == ""


@needs_compiler
@pytest.mark.usefixtures("_compiled_before")
@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_the_cache_is_private_whatever_the_umask(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        loaded, _ = ask(XDG_CACHE_HOME=str(tmp_path))
    finally:
        os.umask(before)
    assert (tmp_path / "pmp_ds").stat().st_mode & 0o777 == 0o700
    assert Path(loaded).stat().st_mode & 0o022 == 0


@needs_compiler
@pytest.mark.usefixtures("_compiled_before")
def test_what_others_could_have_written_is_compiled_again(tmp_path: Path):
    """A folder that was open to all, as an older version made it, and a program in it."""
    loaded, _ = ask(XDG_CACHE_HOME=str(tmp_path))
    for folder_mode, file_mode in ((0o777, 0o755), (0o700, 0o777)):
        Path(loaded).write_bytes(b"planted")
        Path(loaded).chmod(file_mode)
        (tmp_path / "pmp_ds").chmod(folder_mode)
        assert ask(XDG_CACHE_HOME=str(tmp_path)) == (loaded, "")
        assert Path(loaded).read_bytes() != b"planted"
        assert (tmp_path / "pmp_ds").stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.usefixtures("_compiled_before")
def test_a_link_in_place_of_the_cache_is_not_followed(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pmp_ds").symlink_to("elsewhere")
    loaded, _ = ask(XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert Path(loaded).parent == tmp_path / f"pmp_ds-{os.getuid()}"
    assert not list((tmp_path / "elsewhere").iterdir())


@needs_compiler
@pytest.mark.usefixtures("_compiled_before")
@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a folder away")
@pytest.mark.parametrize("given", ["folder", "file"])
def test_the_cache_of_another_user_is_not_used(tmp_path: Path, given: str):
    loaded, _ = ask(XDG_CACHE_HOME=str(tmp_path))
    Path(loaded).write_bytes(b"planted")
    os.chown(tmp_path / "pmp_ds" if given == "folder" else loaded, 12345, 12345)
    found, warning = ask(XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert warning == ""
    assert Path(found).read_bytes() != b"planted"


@needs_compiler
@pytest.mark.usefixtures("_compiled_before")
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
@pytest.mark.usefixtures("_compiled_before")
def test_beside_the_source(source: Path, tmp_path: Path):
    """As in an image: at run time no compiler is asked, and no cache is needed."""
    loaded, _ = ask(source, "build")
    assert Path(loaded).parent == source.parent
    nowhere = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(tmp_path / "no-compiler")}
    assert ask(source, **nowhere) == (loaded, "")
    assert not (tmp_path / "cache").exists()


@needs_compiler
@pytest.mark.usefixtures("_compiled_before")
def test_a_library_of_another_source_is_not_used(source: Path, tmp_path: Path):
    loaded, _ = ask(source, "build")
    source.write_text(f"{source.read_text()}\n// changed\n")
    found, _ = ask(source, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert Path(found).parent == tmp_path / "cache" / "pmp_ds"
    assert Path(loaded).exists()


@needs_compiler
@pytest.mark.usefixtures("_compiled_before")
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
