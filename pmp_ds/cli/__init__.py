"""The command line of every command: dataclasses from flags, positional words and YAML files.

    config, options = parse(Config, argv, options=Options)      settings, and separate options
    options = parse_options(Export, argv, prog="pmp-ds export", description=__doc__)
    run_verb({"seal": (Seal, seal)}, argv, prog="pmp-ds vault", description=__doc__)

A field is a flag and its docstring the line in --help; ``option`` says more about one. Every
mistake is a ``UserError`` of one line, so that ``errors.exit_code`` ends with code 1.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import yaml

from pmp_ds.cli.fields import option
from pmp_ds.cli.form import Form
from pmp_ds.errors import UserError, did_you_mean, require
from pmp_ds.settings import refuse_secret

__all__ = ["NoOptions", "Verbs", "dump", "option", "parse", "parse_options", "run_verb"]

C = TypeVar("C")
Verbs = Mapping[str, tuple[type[Any], Callable[[Any], None]]]
"""Of each verb: its options, whose docstring is its line in --help, and what runs it with them."""

_forms: dict[tuple[Any, ...], Form] = {}


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """No options but the settings."""


def parse(
    cls: type[C],
    argv: Sequence[str],
    *,
    options: type[Any] = NoOptions,
    prog: str | None = None,
    description: str | None = None,
    epilog: str | None = None,
) -> tuple[C, Any]:
    """Return the settings of type ``cls`` that the arguments describe, and the separate
    ``options``, which ``dump`` omits.

    Later flags and ``--config`` files win over earlier ones. ``--help`` and ``--print_config``
    print and raise ``SystemExit(0)``. Raises UserError.
    """
    namespace, made = _form(cls, options, prog, description, epilog).read(argv)
    if namespace.print_config:
        print(dump(made[cls]), end="")
        raise SystemExit(0)
    return made[cls], made[options]


def parse_options(
    cls: type[C], argv: Sequence[str], *, prog: str | None = None, description: str | None = None
) -> C:
    """Return the options of type ``cls`` of a command without settings.

    ``--help`` prints and raises ``SystemExit(0)``; its text is ``description``, or the docstring of
    ``cls``. Raises UserError.
    """
    _, made = _form(None, cls, prog, description, None).read(argv)
    found: C = made[cls]
    return found


def run_verb(
    verbs: Verbs, argv: Sequence[str], *, prog: str, description: str | None = None
) -> None:
    """Run the verb named by the first argument, with the options in the others."""
    require(len(argv) > 0, f"{prog} needs a verb; {prog} --help lists them all")
    word = argv[0]
    if word in verbs:
        options, run = verbs[word]
        run(parse_options(options, argv[1:], prog=f"{prog} {word}"))
    elif word in ("-h", "--help"):
        width = max(map(len, verbs)) + 2
        lines = (f"  {verb:<{width}}{_first_line(verbs[verb][0])}" for verb in verbs)
        print(f"usage: {prog} VERB [options]\n\n{description}\nverbs:", *lines, sep="\n")
        print(f"\n{prog} VERB --help explains each.")
        raise SystemExit(0)
    else:
        refuse_secret(word, prog)
        guess = did_you_mean(word, verbs)
        raise UserError(f"unknown verb {word}{guess}; {prog} --help lists them all")


def dump(config: Any) -> str:
    """Return the whole config as YAML; ``parse`` with ``--config`` of it gives an equal config."""
    # JSON on the way: yaml has no tuples.
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return text


def _form(settings: type[Any] | None, options: type[Any], *texts: str | None) -> Form:
    key = (settings, options, *texts)
    if key not in _forms:  # a sweep parses hundreds of times
        _forms[key] = Form(settings, options, *texts)
    return _forms[key]


def _first_line(cls: type[Any]) -> str:
    return (cls.__doc__ or "").partition("\n")[0]
