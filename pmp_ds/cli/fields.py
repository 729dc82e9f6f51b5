"""The fields of dataclasses as the command line sees them."""

import dataclasses
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def option(
    metavar: str | None = None,
    default: Any = dataclasses.MISSING,
    *,
    positional: bool = False,
    hidden: bool = False,
) -> Any:
    """Return a field of options whose value --help calls ``metavar``. Without a default it is
    required; ``positional`` makes it a word without a flag, ``hidden`` leaves it out of --help."""
    metadata = {"metavar": metavar, "positional": positional, "hidden": hidden}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Field:
    """One value, wherever in the tree of sections it stands."""

    name: str
    """With its sections: `train.lr`."""

    hint: Any
    declared: dataclasses.Field[Any]

    def said(self, what: str) -> Any:
        """Return an entry of the field's metadata; `choices` are names of a registry."""
        return self.declared.metadata.get(what)

    @property
    def item(self) -> Any:
        """The type of one of several words; None where there is a single value."""
        origin, inner = get_origin(self.hint), get_args(self.hint)
        several = origin is list or (origin is tuple and inner[1:] == (...,))
        return inner[0] if several and inner[0] in _METAVARS else None

    @property
    def positional(self) -> bool:
        return bool(self.said("positional"))

    @property
    def required(self) -> bool:
        found = self.declared
        return found.default is found.default_factory is dataclasses.MISSING

    @property
    def flag(self) -> str:
        """The flag as declared to the parser."""
        return f"--{self.name}"

    @property
    def shown(self) -> str:
        """The name of an option in error messages."""
        return self.metavar if self.positional else self.flag.replace("_", "-")

    @property
    def metavar(self) -> str:
        """The placeholder of the value in --help, or an empty text."""
        if choices := self.said("choices"):
            return "{" + ",".join(choices) + "}"
        union = get_origin(self.hint) in (Union, types.UnionType)
        kinds = get_args(self.hint) if union else (self.item or self.hint,)
        words = "|".join(
            _METAVARS.get(kind) or "|".join(get_args(kind))
            for kind in kinds
            if kind in _METAVARS or (union and get_origin(kind) is Literal)
        )
        return self.said("metavar") or words

    @property
    def in_help(self) -> str:
        """The metavar as often as there may be words."""
        return f"{self.metavar} [{self.metavar} ...]" if self.item else self.metavar

    @property
    def in_usage(self) -> str:
        return self.in_help if self.positional else f"{self.shown} {self.in_help}"


def fields_of(cls: Any, prefix: str = "") -> Iterator[Field]:
    """Yield every value of the dataclass ``cls`` and of its sections."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields_of(hint, f"{prefix}{field.name}.")
        else:
            yield Field(prefix + field.name, hint, field)
