"""The version of this code, and the commit it was made from.

    str(code_version())  ->  pmp-ds 0.1.0 (commit 95a70fc21d7e)

A checkout asks git, a wheel or source archive has a file written by setup.py, and a container image
has the environment variable PMP_DS_COMMIT.
"""

import contextlib
import functools
import os
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pmp_ds import __version__

COMMIT_FILE = "COMMIT"
"""A file in the package's folder; only wheels and source archives have it."""

COMMIT_VARIABLE = "PMP_DS_COMMIT"

UNKNOWN = "unknown"

_GIT_TIMEOUT = 20.0  # seconds; a checkout on a network file system can be slow to compare


@dataclass(frozen=True)
class CodeVersion:
    """A version and a commit of pmp-ds."""

    version: str
    commit: str
    """12 hexadecimal digits, with `-dirty` if tracked files differ; or `unknown`."""

    def __str__(self) -> str:
        return f"pmp-ds {self.version} (commit {self.commit})"


@functools.cache
def code_version() -> CodeVersion:
    """Return the code version of this process. Cached: a later `git pull` does not change it."""
    return CodeVersion(__version__, commit_of(Path(__file__).resolve().parent))


def commit_of(package: Path) -> str:
    """Return the commit of the pmp_ds in the folder ``package``, or `unknown`."""
    if commit := _of_checkout(package.parent):
        return commit
    with contextlib.suppress(OSError):
        if commit := (package / COMMIT_FILE).read_text(encoding="utf-8").strip():
            return commit
    return os.environ.get(COMMIT_VARIABLE, "").strip() or UNKNOWN


def _of_checkout(root: Path) -> str | None:
    """Return git's answer for ``root``, or None if it is not a checkout of this project.

    A copy inside another repository is surrounded by that project's commit, so ``root`` itself must
    contain both .git and our pyproject.toml.
    """
    if not (root / ".git").exists() or not _is_ours(root / "pyproject.toml"):
        return None
    # Without the variables that point git elsewhere, for example inside one of its hooks.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = [
        "git",
        "-c",
        "safe.directory=*",  # the checkout may belong to another user than a container's
        f"--git-dir={root / '.git'}",
        f"--work-tree={root}",
        "describe",
        "--always",
        "--exclude=*",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            cwd=root,
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
            timeout=_GIT_TIMEOUT,
        )
    except (OSError, subprocess.SubprocessError):  # no git, or not a repository it can read
        return None
    return done.stdout.strip() or None


def _is_ours(pyproject: Path) -> bool:
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return False
    return project.get("name") == "pmp_ds"
