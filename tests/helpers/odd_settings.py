"""Every setting of every command with odd values; the settings are read from the dataclasses.

python -m tests.helpers.crafted 'settings of pretrain'    # a table of what became of them
"""

import dataclasses
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pmp_ds.cli import parse
from pmp_ds.config import Config
from pmp_ds.finetune.config import FinetuneConfig
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.study.recipe import Study

STUDY: dict[str, Any] = {
    "arms": {"base": {"configs": []}, "pmp": {"configs": []}},
    "tunings": [{"arms": ["pmp"], "tasks": ["rte"], "methods": ["full"], "sweep": {"seed": [0]}}],
    "evaluations": [{"arms": ["pmp"], "measures": ["glue"]}],
}
COMMANDS: dict[str, tuple[type, dict[str, Any]]] = {
    "pretrain": (Config, {}),
    "finetune": (FinetuneConfig, {"model": "m", "task": "rte"}),
    "prepare_data": (PrepareConfig, {}),
    "study": (Study, STUDY),
}
VALUES = {
    "null": None,
    "text": "abc",
    "list": [["a"]],
    "mapping": {"a": {"b": 1}},
    "bool": True,
    "NaN": math.nan,
    "negative": -1,
    "fraction": -0.5,
    "huge": 10**30,
    "infinite": math.inf,
}

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Odd:
    """Describe one file of settings."""

    command: str
    place: Place
    hint: Any
    kind: str
    text: str

    @property
    def name(self) -> str:
        """Return a name that is unique among the files of a command."""
        return f"{'.'.join(map(str, self.place))}, {self.kind}"

    def open(self, folder: Path) -> None:
        """Load the file. Raises UserError if it is refused; a value of another type is a bug."""
        cls: type[Any] = COMMANDS[self.command][0]
        path = folder / "odd.yaml"
        path.write_text(self.text, encoding="utf-8")
        config, _ = parse(cls, ["--config", str(path)])
        value = at(config, self.place)
        assert _fits(value, self.hint), f"{value!r} is not {self.hint}"
        assert self.kind in VALUES, f"accepted though {self.kind}"


def settings(command: str) -> Iterator[tuple[Place, Any]]:
    """Return the place of every setting in the command's file, and its type."""
    cls, given = COMMANDS[command]
    yield from _settings(cls, given, ())


def odd(command: str) -> Iterator[Odd]:
    """Yield every setting with every odd value, misspelt, and duplicated."""
    _, given = COMMANDS[command]
    for place, hint in settings(command):
        for kind, value in VALUES.items():
            yield Odd(command, place, hint, kind, written(given, place, value))
        *above, name = place
        misspelt = written(given, (*above, f"{name}z"), 1)
        yield Odd(command, place, hint, "misspelt", misspelt)
        once = written(given, (*above, "TWICE"), 1).splitlines()
        twice = "\n".join(
            f"{line}\n{line.replace('- TWICE', '  TWICE')}" if "TWICE" in line else line
            for line in once
        )
        yield Odd(command, place, hint, "duplicate", twice.replace("TWICE", str(name)))


def written(given: Any, place: Place, value: Any) -> str:
    """Return the settings ``given`` as YAML, with ``value`` at ``place``."""
    return yaml.safe_dump(_with(given, place, value))


def _settings(cls: Any, given: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    for name, hint in get_type_hints(cls).items():
        inner, there = (*place, name), given.get(name) if isinstance(given, dict) else None
        yield inner, hint
        if dataclasses.is_dataclass(hint):
            yield from _settings(hint, there or {}, inner)
        elif get_args(hint) and dataclasses.is_dataclass(element := get_args(hint)[-1]) and there:
            key = 0 if isinstance(there, list) else next(iter(there))
            yield from _settings(element, there[key], (*inner, key))


def _with(given: Any, place: Place, value: Any) -> Any:
    """Return a copy of ``given`` with ``value`` at ``place``."""
    if not place:
        return value
    first, *rest = place
    if isinstance(first, int):
        return [
            _with(one, tuple(rest), value) if i == first else one for i, one in enumerate(given)
        ]
    there = given if isinstance(given, dict) else {}
    return {**there, first: _with(there.get(first), tuple(rest), value)}


def at(config: Any, place: Place) -> Any:
    """Return the value at ``place`` of a loaded config."""
    part: Any
    for part in place:
        config = config[part] if isinstance(config, dict | list) else getattr(config, part)
    return config


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a loaded value matches its type exactly."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, inner[0]) and _fits(one, inner[1]) for key, one in value.items()
        )
    if origin in (list, tuple):
        return isinstance(value, origin) and all(_fits(one, inner[0]) for one in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint and (hint is not int or abs(value) < 2**63)
