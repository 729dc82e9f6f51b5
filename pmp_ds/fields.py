"""The types of decoded JSON's fields, declared once as a dataclass or a TypedDict.

    record = fit(Record, values, f"{path}, line 3")

Raises UserError that names the first field that is missing, unknown or has another type.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import (
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from pmp_ds.errors import UserError

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "null",
}
_LARGEST = 1 << 63


class _Misfit(Exception):
    """A place in a value, its content, and the expected content."""


def fit(kind: Any, value: Any, where: object) -> Any:
    """Return ``value``, decoded JSON, as ``kind``; objects become dataclasses, and lists tuples.

    A dataclass allows no other fields; a TypedDict does. Raises UserError that starts with
    ``where``.
    """
    try:
        return _fit(kind, value, "")
    except _Misfit as misfit:
        raise UserError(f"{where} is damaged: {misfit}") from None


def _fit(kind: Any, value: Any, name: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        found = _object(kind, _of(dict, kind, value, name), name)
        return kind(**found) if isinstance(kind, type) and not is_typeddict(kind) else found
    if origin in (Union, types.UnionType):
        return _any_of(args, kind, value, name)
    if origin is Literal:
        if not any(type(value) is type(arg) and value == arg for arg in args):
            raise _misfit(kind, value, name)
        return value
    if origin in (list, tuple, Sequence):
        values = _of(list, kind, value, name)
        pair = origin is tuple and args[-1] is not Ellipsis
        if pair and len(values) != len(args):
            raise _misfit(kind, value, name)
        kinds = args if pair else [args[0]] * len(values)
        pairs = zip(kinds, values, strict=True)
        made = [_fit(one, v, f"{name}[{i}]") for i, (one, v) in enumerate(pairs)]
        return tuple(made) if origin is tuple else made
    if origin in (dict, Mapping):
        values = _of(dict, kind, value, name)
        return {key: _fit(args[1], inner, _below(name, key)) for key, inner in values.items()}
    return _scalar(kind, value, name)


def _any_of(kinds: Sequence[Any], kind: Any, value: Any, name: str) -> Any:
    """Return ``value`` as the kind that fits; of one kind or null, raise that kind's error."""
    for one in kinds:
        try:
            return _fit(one, value, name)
        except _Misfit:
            continue
    real = [one for one in kinds if one is not types.NoneType]
    if len(real) == 1 and isinstance(value, dict | list):
        return _fit(real[0], value, name)
    raise _misfit(kind, value, name)


def _scalar(kind: Any, value: Any, name: str) -> Any:
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (type(value) is int and abs(value) >= _LARGEST):
        raise _misfit(kind, value, name)
    return value


def _object(kind: Any, values: dict[str, Any], name: str) -> dict[str, Any]:
    hints, needed = _hints(kind)
    if missing := sorted(needed - values.keys()):
        raise _Misfit(f"it lacks {_below(name, missing[0])}")
    unknown = sorted(values.keys() - hints.keys())
    if unknown and dataclasses.is_dataclass(kind):
        raise _Misfit(f"it has the unknown field {_below(name, unknown[0])!r:.80}")
    known = {
        key: _fit(hints[key], values[key], _below(name, key)) for key in hints if key in values
    }
    return values | known


@cache
def _hints(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the type of each field, and the required fields."""
    if dataclasses.is_dataclass(kind):
        made = [f for f in dataclasses.fields(kind) if f.init]
        hints = get_type_hints(kind)
        free = dataclasses.MISSING
        needed = {f.name for f in made if f.default is free and f.default_factory is free}
        return {f.name: hints[f.name] for f in made}, frozenset(needed)
    return get_type_hints(kind), frozenset(kind.__required_keys__)


def _of(container: type, kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, container):
        raise _misfit(kind, value, name)
    return value


def _below(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _misfit(kind: Any, value: Any, name: str) -> _Misfit:
    text = repr(value) if not isinstance(value, dict | list) else type(value).__name__
    return _Misfit(f"{name or 'it'} is {text:.60}, not {_words(kind)}")


def _words(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(arg) for arg in args)
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}"
    if origin in (list, tuple, Sequence):
        return "a list"
    return _WORDS.get(kind, "an object")
