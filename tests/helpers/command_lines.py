"""What the parsers of pmp-ds, its launchers and DeepSpeed make of a command line, without running
it.

    made = read(["deepspeed", "launcher/pretrain.py", "--config", "demo"])
    made[Config].train.lr
    forms()["pmp-ds vault seal"].fields

Raises UserError for a command line that the command would refuse while it parses: unknown flags,
values of other types, values that a setting's class refuses, unknown names of recipes and DeepSpeed
JSON files.
"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pmp_ds.launch
from pmp_ds.cli.form import Form
from pmp_ds.commands import VERBS, OnRanks, module_of
from pmp_ds.engine.deepspeed_config import read_json
from pmp_ds.errors import UserError, require
from tests.helpers.distributed import REPO

Made = dict[type[Any], Any]
_FILE = re.compile(r"launcher/(\w+)\.py")


class _Read(BaseException):
    """A command has parsed its words."""

    def __init__(self, form: Form, made: Made) -> None:
        self.form, self.made = form, made


def read(words: Sequence[str]) -> Made:
    """Return the settings and options of a command line that starts one of our commands, or
    nothing if it only starts a module. Raises UserError, and AssertionError for another program."""
    program, *rest = words
    if program == "pmp-ds":
        return read_verb(rest)
    if program in ("python", "python3") and rest[:1] == ["-m"]:
        return _module(rest[1], rest[2:])
    if program in ("python", "python3"):
        return read_verb([_verb(rest[0]), *rest[1:]])
    if program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        try:
            found = parse_args(list(rest))
        except SystemExit as end:  # argparse has said why
            raise UserError(f"deepspeed refuses {rest}") from end
        if found.module:
            return _module(found.user_script, found.user_args)
        return read_verb([_verb(found.user_script), *found.user_args])
    raise AssertionError(f"{program} is not a program of ours")


def read_verb(words: Sequence[str]) -> Made:
    """Return the settings and options of `pmp-ds WORDS`; none for `--help`."""
    if words and words[0] in ("--help", "--version"):
        return {}
    verb = words[0].replace("_", "-") if words else ""
    require(verb in VERBS, f"unknown command {verb}")
    found = _parsed(verb, list(words[1:]))
    for options in found.values():
        if isinstance(options, OnRanks):
            read_json(options.deepspeed_config)
        if grid := getattr(options, "sweep", None):
            from pmp_ds.finetune import sweep

            for flags in sweep.cells(sweep.grid(grid)).values():
                _parsed(verb, [*words[1:], *flags])
    return found


def forms() -> dict[str, Form]:
    """Return the parser of every command, by its name: `pmp-ds export`, `pmp-ds vault seal`."""
    found = {}
    for verb in VERBS:
        inner = list(getattr(importlib.import_module(module_of(verb)), "VERBS", {}))
        names = [[], *([word] for word in inner)] if verb == "prepare-data" else [[]]
        for words in [[word] for word in inner] if inner and verb == "vault" else names:
            found[" ".join(["pmp-ds", verb, *words])] = _form(verb, words)
    return found


def _form(verb: str, words: list[str]) -> Form:
    def read(self: Form, argv: Sequence[str]) -> Any:
        raise _Read(self, {})

    with mock.patch.object(Form, "read", read):
        return _until_read(verb, words).form


def _parsed(verb: str, words: list[str]) -> Made:
    real = Form.read

    def read(self: Form, argv: Sequence[str]) -> Any:
        raise _Read(self, real(self, argv)[1])

    with mock.patch.object(Form, "read", read):
        return _until_read(verb, words).made


def _until_read(verb: str, words: list[str]) -> _Read:
    module = importlib.import_module(module_of(verb))
    start = module.main if hasattr(module, "main") else module.prepare
    try:
        with mock.patch.object(sys, "argv", ["pmp-ds"]):
            start(words)
    except _Read as found:
        return found
    except SystemExit:  # --help of several verbs
        return _Read(mock.Mock(), {})
    raise AssertionError(f"pmp-ds {verb} {' '.join(words)} did not parse its words")


def _module(name: str, words: list[str]) -> Made:
    if name == "pmp_ds.launch":
        args = pmp_ds.launch._parse(words)
        file = _FILE.fullmatch(args.command)
        return read_verb([file[1] if file else args.command, *args.arguments])
    if name.startswith("pmp_ds.commands."):
        return read_verb([_verb(name), *words])
    require(importlib.util.find_spec(name) is not None, f"there is no module {name}")
    source = "".join(path.read_text(encoding="utf-8") for path in _sources(name))
    for flag in (word for word in words if source and word.startswith("--")):
        require(f'"{flag}"' in source, f"{name} has no flag {flag}")
    return {}


def _sources(name: str) -> Iterator[Path]:
    """Yield the files that may name a flag of a module of ours; none for another's, as venv."""
    folder, file = REPO / name.partition(".")[0], REPO / name.replace(".", "/")
    if folder.name in ("benchmarks", "pmp_ds", "tests"):
        yield from sorted(folder.glob("*.py")) if folder.name == "benchmarks" else ()
        yield file / "__main__.py" if file.is_dir() else file.with_suffix(".py")


def _verb(script: str) -> str:
    """Return `prepare_data` for launcher/prepare_data.py or pmp_ds.commands.prepare_data."""
    if match := _FILE.fullmatch(script):
        return match[1]
    if script.startswith("pmp_ds.commands."):
        return script.rpartition(".")[2]
    raise UserError(f"{script} is not a command of pmp-ds")
