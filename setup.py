"""Writes the commit into wheels and source archives, where pmp_ds/version.py finds it, and recipes
and DeepSpeed JSON files into wheels, where pmp_ds/shipped.py does. Everything else is in
pyproject.toml."""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent


def write_commit(package: Path) -> None:
    """Write the commit of this source tree into the copy ``package``."""
    sys.path.insert(0, str(ROOT))
    from pmp_ds.version import COMMIT_FILE, UNKNOWN, commit_of

    commit, target = commit_of(ROOT / "pmp_ds"), package / COMMIT_FILE
    if commit != UNKNOWN:
        target.unlink(missing_ok=True)  # may be a hard link to the source's own
        target.write_text(commit + "\n", encoding="utf-8")


def copy_files(package: Path) -> None:
    """Copy what the checkout has beside the package into ``package``."""
    for folder, pattern in (("launcher/recipes", "*.yaml"), ("ds_configs", "*.json")):
        target = package / Path(folder).name
        target.mkdir(exist_ok=True)
        for path in sorted((ROOT / folder).glob(pattern)):
            shutil.copyfile(path, target / path.name)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there the checkout itself says it
            write_commit(Path(self.build_lib) / "pmp_ds")
            copy_files(Path(self.build_lib) / "pmp_ds")


class Sdist(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir) / "pmp_ds")


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
