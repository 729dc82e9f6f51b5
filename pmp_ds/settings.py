"""Rules for every setting of every command, whatever its name.

A value is null only if its type allows it, numbers are finite and fit into 64 bits, and a path may
begin with `~` or `$VARIABLE`. The settings' own classes check the rest.
"""

import dataclasses
import math
import os
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pmp_ds.errors import UserError, require

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})(?=/|$)")
_SECRET_KEY = re.compile(r"\s*(AGE-SECRET-KEY-|-----BEGIN .*PRIVATE KEY)", re.IGNORECASE)


def checked(hint: Any, value: Any, where: str = "", *, texts: bool = True) -> Any:
    """Return ``value`` of a setting or section of type ``hint`` with its paths expanded; any text
    may be one, or without ``texts`` only a ``Path``.

    Sections may be anything with items and are changed in place. Raises UserError.
    """
    if dataclasses.is_dataclass(hint):
        if isinstance(value, str | int | float | list | None):
            shown = "null" if value is None else repr(value)
            raise UserError(f"{where} is a section of settings, not a value: {shown}")
        prefix = f"{where}." if where else ""
        for name, inner in get_type_hints(hint).items():
            value[name] = checked(inner, value[name], prefix + name, texts=texts)
        return value
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None:
        if not {type(None), Any} & set(kinds):
            raise UserError(
                f"{where}: expected {_in_words(kinds)}, got null (in YAML also an empty value and "
                "`~`); leave it out for the default"
            )
        return None
    if isinstance(value, str | Path):
        refuse_secret(str(value), where)
    if isinstance(value, float):
        require(math.isfinite(value), f"{where}={value} is not a finite number")
    elif isinstance(value, int):
        require(abs(value) < 2**63, f"{where}={value} is too large: at most 2^63 - 1")
    elif isinstance(value, Path):
        return Path(expanded(str(value), where))
    elif isinstance(value, str):
        return expanded(value, where) if texts else value
    elif isinstance(value, dict):
        inner = _inner(kinds, dict, 1)
        for key in value:
            require(isinstance(key, str), f"{where}: {key!r} is not text; put it in quotes")
        return {
            expanded(key, where): checked(inner, one, f"{where}.{key}" if where else key)
            for key, one in value.items()
        }
    elif isinstance(value, list | tuple):
        inner = _inner(kinds, type(value), 0)
        return type(value)(checked(inner, one, where, texts=texts) for one in value)
    return value


def refuse_secret(text: str, where: str) -> None:
    """Raise UserError, without repeating it, if ``text`` is a secret key instead of its file."""
    if _SECRET_KEY.match(text):
        raise UserError(
            f"{where} was given a secret key itself, which is not repeated here: give the name of "
            "its file (or where a public key is wanted, that one, which starts age1 or ssh-)"
        )


def expanded(text: str, where: str) -> str:
    """Return ``text`` with a leading `~`, `~USER` or `$VARIABLE` replaced, as a shell does.

    Raises UserError if the home or variable does not exist: nobody wants a folder called `~`.
    """
    if text.startswith("~"):
        home = os.path.expanduser(text)
        if home == text:
            raise UserError(f"{where}={text}: no such home; write it out, or use ./{text}")
        return home
    if match := _VARIABLE.match(text):
        name = match[1].strip("{}")
        if name not in os.environ:
            raise UserError(f"{where}={text}: the variable {name} is not set; write the path out")
        return os.environ[name] + text[match.end() :]
    return text


def _inner(kinds: tuple[Any, ...], kind: type, place: int) -> Any:
    """Return the type of a ``kind``'s elements, as far as a hint declares it."""
    for hint in kinds:
        origin = get_origin(hint)
        if origin is kind or (kind is not dict and origin in (tuple, list)):
            return get_args(hint)[place]
    return Any


def _in_words(kinds: tuple[Any, ...]) -> str:
    words = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words.append(f"one of {', '.join(map(repr, get_args(kind)))}")
        else:
            words.append(getattr(get_origin(kind) or kind, "__name__", str(kind)))
    return " or ".join(words)
