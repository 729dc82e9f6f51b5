"""The words of a command line, each step nearer to what the parser reads."""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import yaml

from pmp_ds import shipped
from pmp_ds.cli.fields import Field, fields_of
from pmp_ds.errors import UserError, require
from pmp_ds.settings import expanded, refuse_secret
from pmp_ds.strict_yaml import parse as parse_yaml
from pmp_ds.strict_yaml import read_settings

_NUMBER = re.compile(r"-\.?\d")


def spelled(argv: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the words with every flag as it is declared: `-` and `_` are the same in a flag."""
    declared = {flag.replace("-", "_"): flag for flag in known}
    words = (word.partition("=") for word in argv)
    return [
        declared.get(flag.replace("-", "_"), flag) + rest + value for flag, rest, value in words
    ]


def without_secrets(argv: Sequence[str]) -> Sequence[str]:
    """Return the words. Raises UserError before any of them is quoted if one is a secret key."""
    where = "this command"
    for word in argv:
        refuse_secret(word, where)
        if word.startswith("--"):
            where, _, value = word.partition("=")
            refuse_secret(value, where)
    return argv


def with_switches(fields: Sequence[Field], argv: Sequence[str]) -> list[str]:
    """Give a boolean's flag without a value the value true."""
    switches = {field.flag for field in fields if field.hint is bool}
    positional = any(field.positional for field in fields)
    out: list[str] = []
    for word, follower in pairwise([*argv, "-"]):
        is_value = follower in ("true", "false") if positional else follower[:1] != "-"
        out.append(word if word not in switches or is_value else f"{word}=true")
    return out


def with_lists(fields: Sequence[Field], argv: Sequence[str]) -> list[str]:
    """Turn ``--input a b --input c`` into ``--input ["a", "b", "c"]``."""
    items = {field.flag: field.item for field in fields if field.item}
    out: list[str] = []
    values: dict[str, list[str]] = {}
    current: str | None = None
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("-") and not (current and _NUMBER.match(word)):
            current = name if name in items else None
            if current is not None:
                values.setdefault(current, []).extend([value] if equals else [])
                continue
        elif current is not None:
            values[current].append(word)
            continue
        out.append(word)
    for flag, words in values.items():
        if not words:
            out.append(flag)
        elif len(words) == 1 and _is_list(words[0]):
            out += [flag, words[0]]
        elif items[flag] in (int, float):
            out.append(f"{flag}=[{', '.join(word or 'null' for word in words)}]")
        else:
            out += [flag, json.dumps(words)]
    return out


def with_files(cls: type[Any], argv: Sequence[str]) -> list[str]:
    """Replace the name of each ``--config`` file by its content, because jsonargparse would not
    name the file of a mistake and would miss some."""
    words = iter(argv)
    out: list[str] = []
    for word in words:
        flag, equals, path = word.partition("=")
        if flag != "--config":
            out.append(word)
        elif path := path if equals else next(words, ""):
            settings = _read_file(cls, path)
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            out.append(f"--config={text}")
        else:
            out.append(flag)
    return out


def _read_file(cls: type[Any], path: str) -> dict[str, Any]:
    name = f"--config {path}"
    found = shipped.recipe(expanded(path, "--config"))
    if not found.exists():
        known = ", ".join(shipped.recipes())
        raise UserError(f"{name} cannot be read: {found} is missing; recipes by name: {known}")
    settings = read_settings(found, name)
    for key in ("config", "print_config"):
        require(key not in settings, f"{name}: {key} is a flag, not a setting")
    for field in fields_of(cls):
        if field.item is str:  # a list of text may be one text
            *sections, last = field.name.split(".")
            values: Any = settings
            for section in sections:
                values = values.get(section) if isinstance(values, dict) else None
            if isinstance(values, dict) and isinstance(values.get(last), str):
                values[last] = [values[last]]
    return settings


def _is_list(word: str) -> bool:
    """Return whether it is `[a, b]`; `[ab]1.jsonl` is a pattern."""
    try:
        return word.startswith("[") and isinstance(parse_yaml(word), list)
    except yaml.YAMLError:
        return False
