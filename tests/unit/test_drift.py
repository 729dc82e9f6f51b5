"""Lists in documents match the code: settings, flags, layers, modules, DeepSpeed keys."""

import dataclasses
import importlib
import pkgutil
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pmp_ds import commands
from pmp_ds.config import Config, TrainConfig
from pmp_ds.engine.deepspeed_config import OWN_SECTION, merge
from pmp_ds.engine.deepspeed_refused import REFUSED
from pmp_ds.finetune.config import FinetuneConfig
from pmp_ds.prepare.config import PrepareConfig
from tests.helpers.odd_deepspeed import every_key
from tests.unit.test_docs import REPO, code, documents
from tests.unit.test_layers import ROWS

OTHERS = {
    "--collector.textfile.directory",  # node_exporter
    "--gpus-per-node",
    "--ntasks-per-node",
    "--open-mode",
    "--requeue",
    "--signal",
    "--wait",  # SLURM
    "--array",
    "--cpus-per-task",
    "--dependency",
    "--parsable",
    "--wrap",  # sbatch
    "--read-only",
    "--shm-size",
    "--tmpfs",
    "--user",  # containers
    "--hostfile",
    "--logdir",
    "--max-restarts",  # deepspeed, tensorboard, torchrun
    "--public_key",
    "--signature",  # model_signing
}
"""Flags of other programs that documents name."""


def fields(cls: Any, prefix: str = "") -> Iterator[str]:
    """Return the dotted names of all settings."""
    for name, kind in typing.get_type_hints(cls).items():
        yield prefix + name
        if dataclasses.is_dataclass(kind):
            yield from fields(kind, f"{prefix}{name}.")


SETTINGS = {name for cls in (Config, FinetuneConfig, PrepareConfig) for name in fields(cls)}
SECTIONS = {name.split(".")[0] for name in fields(Config) if "." in name}


def options_of_commands() -> Iterator[str]:
    """Return the fields of the dataclasses of pmp_ds.commands."""
    for found in pkgutil.iter_modules(commands.__path__, f"{commands.__name__}."):
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value):
                yield from (field.name for field in dataclasses.fields(value))


def flags() -> set[str]:
    """Return the flags of our own programs: settings, and those that the sources declare."""
    tops = ("launcher", "pmp_ds", "benchmarks", "tests/helpers", "tests/clients", "tests/pretend")
    sources = "\n".join(p.read_text() for top in tops for p in (REPO / top).rglob("*.py"))
    options = re.findall(r'^ +"(\w+)": (?:\{|dict\()', sources, re.MULTILINE)
    declared = re.findall(r'"(--[\w-]+)', sources)
    names = [*SETTINGS, *options, *options_of_commands()]
    found = {f"--{name}" for name in names} | set(declared) | OTHERS
    return found | {flag.replace("_", "-") for flag in found}  # both are accepted


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_flags_and_settings_exist(document: Path) -> None:
    text = code(document.read_text())
    named = {flag.rstrip(".") for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", text)}
    assert sorted(named - flags()) == []
    sections = "|".join(sorted(SECTIONS))
    dotted = set(re.findall(rf"(?<![\w./-])(?:{sections})\.[a-z]\w*(?![\w/(])", text))
    endings = ("json", "jsonl", "safetensors", "sig", "yaml", "py")
    assert sorted(name for name in dotted - SETTINGS if not name.endswith(endings)) == []


def test_layers_are_those_of_the_test() -> None:
    text = (REPO / "docs/ARCHITECTURE.md").read_text()
    (line,) = re.findall(r"^launcher \|.*$", text, re.MULTILINE)
    assert [set(row.split()) for row in line.split("|")] == [set(row) for row in reversed(ROWS)]


def test_modules_of_the_map_are_those_of_the_package() -> None:
    """Each file of pmp_ds is in ARCHITECTURE's map, in its folder, and nothing else is."""
    text = (REPO / "docs/ARCHITECTURE.md").read_text().split("```")[1]
    listed: dict[str, set[str]] = {}
    room = ""
    for line in text[text.index("pmp_ds/") :].partition("\nds_configs/")[0].splitlines():
        found = re.match(r"(?:pmp_ds/|( {2}| {4})(\w+)/) +(.*)", line)
        if found:
            inner = found[1] == " " * 4
            room = f"{room.split('/', maxsplit=1)[0]}/{found[2]}" if inner else found[2] or ""
        rest = found[3] if found else line
        listed.setdefault(room, set()).update(re.split(r" {3,}", rest.strip())[0].split())
    files = {
        room: {path.stem for path in (REPO / "pmp_ds" / room).glob("*.py")} - {"__init__"}
        for room in listed
    }
    differ = {room: sorted(listed[room] ^ files[room]) for room in listed}
    assert {room: names for room, names in differ.items() if names} == {}


def named(heading: str) -> set[str]:
    """Return the keys in the bullets, or in the first column, of a section of
    ds_configs/README.md."""
    text = (REPO / "ds_configs/README.md").read_text()
    section = re.split(r"^## ", text[text.index(f"## {heading}") + 3 :], flags=re.MULTILINE)[0]
    bullets = re.findall(r"^- .*(?:\n  .*)*", section, re.MULTILINE)
    column = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for one in bullets + column for name in re.findall(r"`(\w+)", one)}


def test_keys_of_a_deepspeed_json() -> None:
    """Every accepted key is in one of README's two lists, and nothing else is; the recipe's own
    keys may be left to it."""
    belongs, owned = named("What belongs here"), named("What the recipe owns")
    accepted = {key for key in every_key() if "." not in key} - set(REFUSED)
    assert belongs | owned - set(REFUSED) == accepted | {OWN_SECTION}
    assert belongs & owned == set()
    config = TrainConfig(global_batch_size=4, micro_batch_size=4)
    assert merge(dict.fromkeys(owned, "auto"), config, 1) == merge({}, config, 1)
