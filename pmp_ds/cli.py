"""The command line of every launcher: a dataclass tree from flags and YAML files.

    config, extras = parse(Config, sys.argv[1:], options={"--resume": {"action": "store_true"}})

Every mistake is a ``UserError`` of one line, so that ``errors.exit_code`` ends with code 1.
"""

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from pmp_ds.errors import UserError

C = TypeVar("C")

HIDDEN = argparse.SUPPRESS
"""As an option's ``help``: accepted but not shown."""

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
        help="YAML file of settings; may be given several times, later files win over earlier "
        "ones and flags over files where they follow",
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
    _check_files(argv)
    try:
        namespace = parser.parse_args(_join_lists(cls, argv))
        _check_sections(cls, namespace)
        values = parser.instantiate(namespace)
        config = cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})  # type: ignore[arg-type]
    except UserError:
        raise
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_line(error, parser)) from error
    if namespace.print_config:
        print(dump(config), end="")
        raise SystemExit(0)
    names = [flag.lstrip("-").replace("-", "_") for flag in options or {}]
    return config, {name: namespace[name] for name in names}


def dump(config: Any) -> str:
    """The whole config as YAML; ``parse`` with ``--config`` of it gives an equal config."""
    # JSON on the way: yaml has no tuples.
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return text


class PlainParser(argparse.ArgumentParser):
    """For launchers without a settings tree; keeps line breaks, and a mistake is a UserError."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of description and epilog and leaves out the long usage line."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage("%(prog)s [options]" if usage is None else usage, actions, groups, prefix)


def _check_files(argv: Sequence[str]) -> None:
    """Name the ``--config`` file that is no YAML mapping; jsonargparse does not."""
    for number, word in enumerate(argv):
        flag, equals, path = word.partition("=")
        if flag != "--config" or (not equals and number + 1 == len(argv)):
            continue
        path = path if equals else argv[number + 1]
        try:
            with open(path, encoding="utf-8") as file:
                settings = yaml.safe_load(file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--config {path} cannot be read: {reason}") from error
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--config {path} is not YAML: {reason}") from error
        if not isinstance(settings, dict):
            raise UserError(f"--config {path} holds no settings: write `name: value` lines")


def _check_sections(cls: type[Any], namespace: Any) -> None:
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and not isinstance(namespace[name], Namespace):
            raise UserError(f"{name} is a section of settings, not a value: {namespace[name]!r}")


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
        if len(words) == 1 and words[0].startswith("["):
            out += [flag, words[0]]
        else:
            out += [flag, json.dumps(words)]
    return out


def _list_fields(cls: type[Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            names += _list_fields(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
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
        if not given.startswith("-"):
            return f"unexpected argument {given!r}; every setting is a flag, see --help"
        return f"unknown flag {given}{_did_you_mean(given, known)}; see --help for all of them"
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
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    if match := re.search(r"Subtypes: \[(.*?)\] Errors.*Given value: (.*)$", text):
        kinds = match[1].replace("NoneType", "null").replace(", ", " or ")
        return f"expected {kinds}, got {match[2]}"
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"\bExpected an? ", "expected ", text)
    return re.sub(r"\. Got value: (.*)$", r", got \1", text)
