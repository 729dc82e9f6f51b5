"""The commit of the code, from any of its four sources."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pmp_ds import __version__
from pmp_ds.version import COMMIT_FILE, COMMIT_VARIABLE, CodeVersion, code_version, commit_of

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="no git")
OURS = '[project]\nname = "pmp_ds"\n'
THEIRS = '[project]\nname = "somebody_else"\n'


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)
    return done.stdout.decode().strip()


def repository(root: Path, pyproject: str = OURS) -> str:
    """Commit a package into a new repository at ``root`` and return the 12 digits."""
    package = root / "pmp_ds"
    package.mkdir(parents=True)
    (root / "pyproject.toml").write_text(pyproject)
    (package / "__init__.py").write_text("one\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "one")
    return git(root, "rev-parse", "--short=12", "HEAD")


@needs_git
def test_a_checkout_asks_git(tmp_path: Path):
    commit = repository(tmp_path)
    package = tmp_path / "pmp_ds"
    assert len(commit) == 12
    assert commit_of(package) == commit
    git(tmp_path, "tag", "-a", "v0.1.0", "-m", "a release")
    (package / "untracked.py").write_text("")
    assert commit_of(package) == commit
    (package / "__init__.py").write_text("two\n")
    assert commit_of(package) == f"{commit}-dirty"


@needs_git
def test_a_worktree_is_a_checkout(tmp_path: Path):
    commit = repository(tmp_path / "main")
    git(tmp_path / "main", "worktree", "add", "--quiet", str(tmp_path / "other"))
    assert (tmp_path / "other" / ".git").is_file()
    assert commit_of(tmp_path / "other" / "pmp_ds") == commit


@needs_git
def test_inside_a_hook_of_another_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = repository(tmp_path / "ours")
    other = repository(tmp_path / "other", THEIRS)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert commit_of(tmp_path / "ours" / "pmp_ds") == commit != other


@needs_git
@pytest.mark.parametrize("where", ["pmp_ds", ".venv/lib/python3.12/site-packages/pmp_ds"])
def test_the_repository_around_an_installation_is_not_ours(tmp_path: Path, where: str):
    """`pip install --target=.`, and a virtual environment in somebody's project."""
    repository(tmp_path, THEIRS)
    package = tmp_path / where
    package.mkdir(parents=True, exist_ok=True)
    assert commit_of(package) == "unknown"
    (package / COMMIT_FILE).write_text("0123456789ab\n")
    assert commit_of(package) == "0123456789ab"


@needs_git
def test_a_broken_checkout_inside_another_repository(tmp_path: Path):
    repository(tmp_path, THEIRS)
    package = tmp_path / "vendored" / "pmp_ds"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(OURS)
    (package.parent / ".git").mkdir()
    assert commit_of(package) == "unknown"


@needs_git
def test_without_git_the_variable_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert commit_of(tmp_path / "pmp_ds") == "unknown"
    monkeypatch.setenv(COMMIT_VARIABLE, "abcdefabcdef")
    assert commit_of(tmp_path / "pmp_ds") == "abcdefabcdef"


def test_in_words():
    assert code_version().version == __version__
    assert str(CodeVersion("0.1.0", "95a70fc9dd51")) == "pmp-ds 0.1.0 (commit 95a70fc9dd51)"
