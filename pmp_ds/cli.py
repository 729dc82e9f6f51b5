"""The command line of every launcher: a dataclass tree from flags and YAML files.

    config, extras = parse(Config, sys.argv[1:], options={"--resume": {"action": "store_true"}})

Every mistake is a ``UserError`` of one line, so that ``errors.exit_code`` ends with code 1.
"""

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from pmp_ds import shipped
from pmp_ds.errors import UserError, require
from pmp_ds.settings import checked, checked_option, expanded
from pmp_ds.strict_yaml import parse as parse_yaml
from pmp_ds.strict_yaml import read_settings

C = TypeVar("C")

HIDDEN = argparse.SUPPRESS
"""As an option's ``help``: accepted but not shown."""

_parsers: dict[tuple[Any, ...], ArgumentParser] = {}

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(
    cls: type[C],
    argv: Sequence[str],
    *,
    prog: str | None = None,
    description: str | None = None,
    epilog: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[C, dict[str, Any]]:
    """The config of type ``cls`` that the arguments describe, and the values of ``options``.

    Later flags and ``--config`` files win over earlier ones. ``options`` maps a flag to the
    keywords of ``add_argument``; its value is found under the flag's name with underscores.
    ``--help`` and ``--print_config`` print and raise ``SystemExit(0)``. Raises UserError.
    """
    key = (cls, prog, description, epilog, repr(options))
    if key not in _parsers:  # a sweep parses hundreds of times
        _parsers[key] = _parser(cls, prog, description, epilog, options)
    parser = _parsers[key]
    try:
        words = spelled(argv, parser._option_string_actions)
        namespace = parser.parse_args(_join_lists(cls, _read_files(cls, words)))
        _check_values(cls, namespace)
        values = parser.instantiate(namespace)
        names = [field.name for field in dataclasses.fields(cast(Any, cls))]
        config = cls(**{name: values[name] for name in names})
    except UserError:
        raise
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_line(error, parser)) from error
    if namespace.print_config:
        print(dump(config), end="")
        raise SystemExit(0)
    found = {flag: flag.lstrip("-").replace("-", "_") for flag in options or {}}
    return config, {name: _option(namespace[name], flag) for flag, name in found.items()}


def _parser(
    cls: type[Any],
    prog: str | None,
    description: str | None,
    epilog: str | None,
    options: Mapping[str, Any] | None,
) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        exit_on_error=False,
        print_config=None,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of settings, or the name of a recipe such as demo; may be given several "
        "times, later files win over earlier ones and flags over files where they follow",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="print the resulting settings as YAML, which --config reads, and exit",
    )
    for flag, keywords in (options or {}).items():
        parser.add_argument(flag, **keywords)
    parser.add_class_arguments(cls)
    for action in parser._actions:  # `--section FILE` works, and would only clutter --help
        if action.metavar == "CONFIG" and action.dest != "config":
            action.help = HIDDEN
    return parser


def dump(config: Any) -> str:
    """The whole config as YAML; ``parse`` with ``--config`` of it gives an equal config."""
    # JSON on the way: yaml has no tuples.
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return text


def spelled(argv: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the words with every flag as it is declared: `-` and `_` are the same in a flag."""
    declared = {flag.replace("-", "_"): flag for flag in known}
    words = (word.partition("=") for word in argv)
    return [
        declared.get(flag.replace("-", "_"), flag) + rest + value for flag, rest, value in words
    ]


class PlainParser(argparse.ArgumentParser):
    """For launchers without a settings tree; keeps line breaks, and a mistake is a UserError."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # of verbs as well
        words = spelled(sys.argv[1:] if args is None else args, self._option_string_actions)
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Paths may begin with `~` or `$VARIABLE`; numbers are finite, counts not negative."""
        found = super().parse_args(args, namespace)
        for name, value in vars(found).items():
            setattr(found, name, checked_option(value, f"--{name.replace('_', '-')}"))
        return found

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of description and epilog, leaves out the long usage line, and spells
    flags with dashes."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        text = super()._format_action_invocation(action)
        return re.sub(r"--[\w.]+", lambda flag: flag[0].replace("_", "-"), text)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage("%(prog)s [options]" if usage is None else usage, actions, groups, prefix)


def _read_files(cls: type[Any], argv: Sequence[str]) -> list[str]:
    """The words of the command line, with what a ``--config`` file says in the place of its name:
    jsonargparse would neither name the file of a mistake nor notice all of them."""
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
    for field in _list_fields(cls):  # a list of text may be one text
        *sections, last = field.split(".")
        values: Any = settings
        for section in sections:
            values = values.get(section) if isinstance(values, dict) else None
        if isinstance(values, dict) and isinstance(values.get(last), str):
            values[last] = [values[last]]
    return settings


def _check_values(cls: type[Any], namespace: Namespace) -> None:
    for name, hint in get_type_hints(cls).items():
        namespace[name] = checked(hint, namespace[name], name)


def _option(value: Any, flag: str) -> Any:
    return expanded(value, flag) if isinstance(value, str) else value


def _join_lists(cls: type[Any], argv: Sequence[str]) -> list[str]:
    """``--input a b --input c`` as ``--input ["a", "b", "c"]``, for lists of text."""
    flags = {f"--{name}" for name in _list_fields(cls)}
    out: list[str] = []
    values: dict[str, list[str]] = {}
    current: str | None = None
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            current = name if name in flags else None
            if current is not None:
                values.setdefault(current, []).extend([value] if equals else [])
                continue
        elif current is not None:
            values[current].append(word)
            continue
        out.append(word)
    for flag, words in values.items():
        if len(words) == 1 and _is_list(words[0]):
            out += [flag, words[0]]
        else:
            out += [flag, json.dumps(words)]
    return out


def _is_list(word: str) -> bool:
    """Whether it is `[a, b]`; `[ab]1.jsonl` is a pattern."""
    try:
        return word.startswith("[") and isinstance(parse_yaml(word), list)
    except yaml.YAMLError:
        return False


def _list_fields(cls: type[Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            names += _list_fields(cast(Any, hint), f"{prefix}{name}.")
        elif get_origin(hint) in (tuple, list) and get_args(hint)[0] is str:
            names.append(prefix + name)
    return names


def _one_line(error: Exception, parser: ArgumentParser) -> str:
    """What jsonargparse says, without its own vocabulary."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    known = [name for action in parser._actions for name in action.option_strings]
    if match := re.match(r"unrecognized arguments: (\S+)", text):
        given = match[1].partition("=")[0]
        flags = [name.replace("_", "-") for name in known]
        if not given.startswith("-"):
            return f"unexpected argument {given!r}; every setting is a flag, see --help"
        return f"unknown flag {given}{_did_you_mean(given, flags)}; see --help for all of them"
    if match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", text) or re.search(
        r"Option '(\S+)' is not accepted", text
    ):
        key = ".".join(match.groups())
        guess = _did_you_mean(key, [name.lstrip("-") for name in known])
        return f"unknown setting {key}{guess}; see --help for all of them"
    if match := re.match(r'Parser key "([^"]+)": (.*)', text):
        return f"{match[1]}: {_plain_types(match[2])}"
    return _plain_types(text)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _plain_types(text: str) -> str:
    text = re.sub(r"Problem with given class_path '[^']*': ", "", text)
    text = re.sub(r'Parser key "([^"]+)": ', r"\1: ", text)
    text = re.sub(r"the following arguments are required: (.*)$", r"\1 is missing", text)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    if match := re.search(r"Subtypes: \[(.*?)\] Errors.*Given value: (.*)$", text):
        kinds = match[1].replace("NoneType", "null").replace(", ", " or ")
        return f"expected {kinds}, got {match[2]}"
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"\bExpected an? ", "expected ", text)
    text = re.sub(r"\. Got value: ?(.*)$", r", got \1", text)
    return re.sub(r", got None$", ", got null", text)
