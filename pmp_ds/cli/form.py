"""The parser of some dataclasses, and the objects made from a command line."""

import argparse
import inspect
import re
from collections.abc import Sequence
from typing import Any, get_type_hints

from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from pmp_ds.cli import words
from pmp_ds.cli.fields import fields_of
from pmp_ds.cli.wording import one_line
from pmp_ds.errors import UserError
from pmp_ds.settings import checked

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Form:
    """The parser of ``settings``, which files may hold, and of ``options``, which are flags."""

    def __init__(
        self,
        settings: type[Any] | None,
        options: type[Any],
        prog: str | None,
        description: str | None,
        epilog: str | None,
    ) -> None:
        self.settings, self.options = settings, options
        self.of_options = {field.name: field for field in fields_of(options)}
        self.fields = [*self.of_options.values(), *(fields_of(settings) if settings else ())]
        required = [field.in_usage for field in self.of_options.values() if field.required]
        self.parser = ArgumentParser(
            prog=prog,
            usage=" ".join(["%(prog)s", *required, "[options]"]),
            description=description or inspect.cleandoc(options.__doc__ or ""),
            epilog=epilog,
            exit_on_error=False,
            print_config=None,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        if settings is not None:
            self._add_files()
        self._add_options()
        if settings is not None:
            self.parser.add_class_arguments(settings)
        self._show_values()

    def read(self, argv: Sequence[str]) -> tuple[Namespace, dict[type[Any], Any]]:
        """Return what the parser found, and an object of each class. Raises UserError."""
        try:
            found = words.without_secrets(argv)
            found = words.spelled(found, self.parser._option_string_actions)
            if self.settings is not None:
                found = words.with_files(self.settings, found)
            found = words.with_switches(self.fields, words.with_lists(self.fields, found))
            namespace = self.parser.parse_args(found)
            made = {self.options: self._made_options(namespace)}
            if self.settings is not None:
                made[self.settings] = self._made_settings(self.settings, namespace)
        except UserError:
            raise
        except (argparse.ArgumentError, TypeError, ValueError) as error:
            flags = list(self.parser._option_string_actions)
            raise UserError(one_line(error, flags, self.of_options)) from error
        return namespace, made

    def _made_options(self, namespace: Namespace) -> Any:
        values = {}
        for name, field in self.of_options.items():
            value = tuple(namespace[name]) if field.item else namespace[name]
            values[name] = checked(field.hint, value, field.shown, texts=False)
        return self.options(**values)

    def _made_settings(self, cls: type[Any], namespace: Namespace) -> Any:
        hints = get_type_hints(cls)
        for name, hint in hints.items():
            namespace[name] = checked(hint, namespace[name], name)
        values = self.parser.instantiate(namespace)
        return cls(**{name: values[name] for name in hints})

    def _add_files(self) -> None:
        self.parser.add_argument(
            "--config",
            action="config",
            metavar="FILE",
            help="YAML file of settings, or the name of a recipe such as demo. May be given "
            "several times; later files win over earlier ones, and flags over files where they "
            "follow.",
        )
        self.parser.add_argument(
            "--print_config",
            action="store_true",
            help="Print the resulting settings as YAML, which --config reads, and exit.",
        )

    def _add_options(self) -> None:
        """Add the options of each class that theirs inherits from in a group of its own, under the
        docstring of that class."""
        left = dict(self.of_options)
        for cls in self.options.__mro__:
            own = [name for name in inspect.get_annotations(cls) if name in left]
            if not own:
                continue
            group: Any = self.parser
            if cls is not self.options:
                group = self.parser.add_argument_group((cls.__doc__ or "").rstrip("."))
            lines = {found.arg_name: found.description for found in parse_from_object(cls).params}
            for field in map(left.pop, own):
                if field.positional:
                    several = "+" if field.item else None
                    self.parser.add_argument(
                        field.name, type=field.item or field.hint, nargs=several
                    )
                elif field.required:
                    group.add_argument(field.flag, type=field.hint, required=True)
                else:
                    default = field.declared.default
                    group.add_argument(field.flag, type=field.hint, default=default)
                self.parser._actions[-1].help = lines.get(field.name)

    def _show_values(self) -> None:
        """Name the kind of each value in --help, and hide entries that would only clutter it."""
        fields = {field.name: field for field in self.fields}
        for action in self.parser._actions:
            if action.dest == "help":
                action.help = "Show this help message and exit."
            elif action.metavar == "CONFIG":  # `--section FILE` works
                action.help = argparse.SUPPRESS
            elif field := fields.get(action.dest):
                action.metavar = field.in_help or action.metavar
                if field.hint is bool and action.dest in self.of_options:
                    action.metavar = ""
                if field.said("hidden"):
                    action.help = argparse.SUPPRESS


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of description and epilog, spells flags with dashes, and names a
    default only where there is one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        text = super()._format_action_invocation(action)
        return re.sub(r"--[\w.]+", lambda flag: flag[0].replace("_", "-"), text).rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if action.required and action.option_strings:
            return f"{text} (required)"
        if action.nargs == 0 or action.metavar == "" or default in (None, "", (), [], {}):
            return text
        if isinstance(default, tuple | list):
            default = " ".join(map(str, default))
        return f"{text} (default: {default})"
