"""`pmp-ds VERB`: every verb has help, and the files that come with the package have names."""

import importlib
import json
import re
from pathlib import Path

import pytest

from pmp_ds import commands, shipped
from pmp_ds.cli import parse, parse_options
from pmp_ds.commands import VERBS, OnRanks, main, module_of
from pmp_ds.commands.evaluate import Evaluate
from pmp_ds.commands.export import Export
from pmp_ds.commands.vault import Show
from pmp_ds.config import Config
from pmp_ds.engine.deepspeed_config import read_json
from pmp_ds.errors import UserError
from tests.helpers.distributed import REPO


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_verb(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: pmp-ds COMMAND")
    assert all(f"\n  {verb} " in said and VERBS[verb] in said for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main([verb.replace("-", "_"), "--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: pmp-ds {verb}")
    assert f" pmp-ds {verb} " in said.partition("\n")[2]  # an example
    assert "==SUPPRESS==" not in said
    assert str(Path.home()) not in said


def test_another_word(capsys: pytest.CaptureFixture[str]):
    assert main(["pretrian"]) == 1
    assert capsys.readouterr().err == (
        "error: unknown command pretrian (did you mean pretrain?); pmp-ds --help lists them all\n"
    )


def test_a_mistake_is_the_exit_code_of_the_verb(capsys: pytest.CaptureFixture[str]):
    assert main(["export", "--run", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: --run nowhere is not a run")


def test_a_checkout_has_a_file_for_each_verb():
    files = {path.stem for path in (REPO / "launcher").glob("*.py")}
    assert files == {verb.replace("-", "_") for verb in VERBS}
    for name in files:
        found = importlib.import_module(f"launcher.{name}").command
        assert found is importlib.import_module(module_of(name)).command


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = REPO / "launcher/recipes/demo.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()  # a folder does not hide a recipe
    by_name = parse(Config, ["--config", "demo", "--config", "base"])[0]
    by_path = ["--config", str(path), "--config", str(path.with_name("base.yaml"))]
    assert by_name == parse(Config, by_path)[0]
    (tmp_path / "demo").write_text("train: {lr: 7.0e-4}")
    assert parse(Config, ["--config", "demo"])[0].train.lr == 7e-4


def test_deepspeed_files_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert read_json("zero2") == json.loads((REPO / "ds_configs/zero2.json").read_text())
    with pytest.raises(UserError, match="nowhere: no such file; files by name: zero0, zero1, z"):
        read_json("nowhere")
    (tmp_path / "zero2").write_text("{}")
    assert read_json("zero2") == {}


def test_files_of_a_wheel_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path)
    assert shipped.recipes() == {}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/own.yaml").write_text("")
    assert shipped.recipe("own") == tmp_path / "recipes/own.yaml"


def test_the_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == commands.__version__


FLAGS = {
    "--train.micro_batch_size": (lambda words: parse(Config, words)[0].train.micro_batch_size, 2),
    "--deepspeed_config": (
        lambda words: str(parse(Config, words, options=OnRanks)[1].deepspeed_config),
        "2",
    ),
    "--batch_size": (
        lambda words: parse_options(Evaluate, ["glue", "--model", "m", *words]).batch_size,
        2,
    ),
    "--max_shard_size": (
        lambda words: parse_options(Export, ["--run", "r", *words]).max_shard_size,
        "2",
    ),
    "--passphrase_file": (
        lambda words: str(parse_options(Show, ["t", *words]).passphrase_file),
        "2",
    ),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_dashes_and_underscores_are_the_same(flag: str):
    read, expected = FLAGS[flag]
    dashed = flag.replace("_", "-")
    for words in ([flag, "2"], [dashed, "2"], [f"{flag}=2"], [f"{dashed}=2"]):
        assert read(words) == expected


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_dashes(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    flags = re.findall(r"(?<!\w)--[a-z][\w.-]*", capsys.readouterr().out)
    assert {flag for flag in flags if "_" in flag} <= {"--num_accelerators"}  # of deepspeed
