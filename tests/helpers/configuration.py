"""The reference of every setting and option, from the dataclasses that define them.

python -m tests.helpers.configuration > docs/CONFIGURATION.md
"""

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from pmp_ds.cli.fields import Field, fields_of
from pmp_ds.cli.form import Form
from pmp_ds.commands import VERBS
from tests.helpers.command_lines import forms
from tests.helpers.distributed import REPO

DOCUMENT = REPO / "docs" / "CONFIGURATION.md"

HEAD = """\
# Configuration reference

Generated from the code: `python -m tests.helpers.configuration > docs/CONFIGURATION.md`.

A **setting** decides what is learned or made. It is a line of the YAML file that `--config` names,
or a flag: `train: {lr: 3.0e-4}` and `--train.lr 3e-4` are the same. `--print-config` prints the
result of all files and flags. An **option** belongs to one call of a command and is a flag only. In
a flag `-` and `_` are the same, and one that is true or false needs no value. A path may begin with
`~` or `$VARIABLE`. How a run fits on the machine is a DeepSpeed JSON, which
[ds_configs/README.md](../ds_configs/README.md) describes.

N is a whole number, X a number; the other words in capitals say what the value names.
"""


def document() -> str:
    """Return docs/CONFIGURATION.md."""
    found = forms()
    parts = [HEAD]
    seen: dict[str, str] = {}
    for verb, line in VERBS.items():
        parts.append(f"## pmp-ds {verb}\n\n{line[0].upper()}{line[1:]}.\n")
        settings = None
        for name, form in found.items():
            if name.split()[1] != verb:
                continue
            words = name.split()[2:]
            if words:
                parts.append(f"### pmp-ds {' '.join([verb, *words])}\n")
            if form.settings is not None and form.settings is not settings:
                settings = form.settings
                parts += _settings(settings, verb, seen)
            parts += _options(form, bool(words))
    return "\n".join(parts)


def _settings(cls: type[Any], verb: str, seen: dict[str, str]) -> Iterator[str]:
    """Yield a table of the settings at the top, then one for each section. A section that another
    command has too, with the same defaults, is a link to it in ``seen``."""
    hints = get_type_hints(cls)
    sections = [field for field in dataclasses.fields(cls) if _is_section(hints[field.name])]
    plain = [field for field in dataclasses.fields(cls) if field not in sections]
    if plain:
        found = [Field(field.name, hints[field.name], field) for field in plain]
        yield _table("setting", found, _lines(cls))
    for field in sections:
        section: Any = hints[field.name]
        title = f"{verb}: {field.name}"
        made = field.default_factory() if callable(field.default_factory) else section()
        table = _table(
            "setting", fields_of(section, f"{field.name}."), _lines(section), defaults=made
        )
        yield f"### {title}\n\n{_cleaned(section.__doc__)}\n"
        other = seen.setdefault(table, title)
        anchor = other.replace(": ", "-")
        yield table if other == title else f"The same as [{other}](#{anchor}).\n"
    for field in plain:
        for inner in filter(_is_section, get_args(hints[field.name])):
            yield f"### {verb}: each of {field.name}\n\n{_cleaned(inner.__doc__)}\n"
            yield _table("setting", fields_of(inner), _lines(inner))


def _is_section(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _options(form: Form, named: bool) -> Iterator[str]:
    """Yield a table of the command's own options, and one for each group that it shares."""
    if not dataclasses.fields(form.options):
        return
    if named:
        yield f"{_cleaned(form.options.__doc__)}\n"
    left = {name: one for name, one in form.of_options.items() if not one.said("hidden")}
    for cls in form.options.__mro__:
        own = [left.pop(name) for name in inspect.get_annotations(cls) if name in left]
        if own and (cls is not form.options or not named):
            yield f"{_cleaned(cls.__doc__)}\n"
        if own:
            yield _table("option", own, _lines(cls))


def _table(
    kind: str, fields: Iterable[Field], lines: dict[str, str], *, defaults: Any = None
) -> str:
    """Return a table of ``fields``; their defaults are their own, or those of an object."""
    rows = [f"| {kind} | value | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        name = field.shown if kind == "option" else field.name
        last = field.name.rpartition(".")[2]
        default = _default(field) if defaults is None else _shown(getattr(defaults, last))
        cells = (f"`{name}`", _kind(field), default, lines.get(last, ""))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _lines(cls: type[Any]) -> dict[str, str]:
    """Return the docstring of each field of ``cls``, on one line."""
    if not dataclasses.is_dataclass(cls):
        return {}
    found = parse_from_object(cls).params
    return {one.arg_name: _cleaned(one.description) for one in found}


def _kind(field: Field) -> str:
    """Return the values that a field may have, in words."""
    if choices := field.said("choices"):
        return ", ".join(f"`{choice}`" for choice in choices)
    if get_origin(field.hint) is not None and "Literal" in str(field.hint):
        words = []
        for one in (field.hint, *get_args(field.hint)):
            if "Literal" in str(get_origin(one)):
                words += [f"`{value}`" for value in get_args(one)]
            elif one in (int, float, str):
                words.append({int: "a whole number", float: "a number", str: "text"}[one])
        return ", ".join(words)
    if field.hint is bool:
        return "`true`, `false`"
    if "dict" in str(field.hint) and field.name.endswith("store"):
        return "a folder, or `{FOLDER: WEIGHT, ...}`"
    if "tuple[float, float]" in str(field.hint):
        return "two numbers"
    if not field.metavar:
        kind = get_origin(field.hint) or field.hint
        return {dict: "names with values", list: "a list"}.get(kind, "YAML")
    values = field.metavar.replace("|", " or ")
    return values + (", one or several" if field.item else "")


def _default(field: Field) -> str:
    """Return the default as one would write it."""
    declared = field.declared
    if declared.default is not dataclasses.MISSING:
        value = declared.default
    elif declared.default_factory is not dataclasses.MISSING:
        value = declared.default_factory()
    else:
        return "**required**"
    return _shown(value)


def _shown(value: Any) -> str:
    if value is None or value in ("", (), [], {}):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`{' '.join(map(str, value))}`"
    return f"`{value}`"


def _cleaned(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()


if __name__ == "__main__":
    print(document(), end="")
