"""Recipes and DeepSpeed JSON files that come with the package, by name.

shipped.recipe("demo")      # demo.yaml of the wheel, or of launcher/recipes/ in a checkout
shipped.ds_config("zero2")
"""

from collections.abc import Mapping
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def recipes() -> Mapping[str, Path]:
    """Return the recipes by name."""
    return _files("recipes", "launcher/recipes", ".yaml")


def ds_configs() -> Mapping[str, Path]:
    """Return the DeepSpeed JSON files by name."""
    return _files("ds_configs", "ds_configs", ".json")


def recipe(given: str) -> Path:
    """Return the file that ``given`` names: a path, or a recipe that comes with the package."""
    return _find(given, recipes())


def ds_config(given: str) -> Path:
    """Return the file that ``given`` names: a path, or a JSON that comes with the package."""
    return _find(given, ds_configs())


def _find(given: str, known: Mapping[str, Path]) -> Path:
    """Return the file ``given``, else the known one of that name, else ``given`` as a path."""
    path = Path(given)
    return path if path.is_file() else known.get(given, path)


def _files(installed: str, checkout: str, suffix: str) -> dict[str, Path]:
    folder = _PACKAGE / installed  # setup.py copies the files there for a wheel
    if not folder.is_dir():
        folder = _PACKAGE.parent / checkout
    return {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))}
