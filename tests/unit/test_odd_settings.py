"""Every setting with odd values is valid or gives a one-line error; paths may begin with `~`."""

import itertools
from pathlib import Path
from typing import Any, get_args

import pytest

from pmp_ds.cli import parse, parse_options
from pmp_ds.cli.fields import fields_of
from pmp_ds.commands import OnRanks, audit, evaluate, export, prepare_data, report, vault
from pmp_ds.config import Config
from pmp_ds.errors import UserError
from pmp_ds.prepare.config import PrepareConfig
from tests.helpers import odd_settings
from tests.helpers.faults import seen
from tests.helpers.tiers import daily


@pytest.mark.parametrize("every", daily([1, 5], [5]))
@pytest.mark.parametrize("command", odd_settings.COMMANDS)
def test_odd_values_of_every_setting(command: str, every: int, tmp_path: Path):
    """1,850 files; `make crafted` counts them. One in five is two or three of every setting's 12
    kinds, and every kind for many settings."""
    bad = []
    for one in itertools.islice(odd_settings.odd(command), 0, None, every):
        try:
            one.open(tmp_path)
        except UserError as error:
            words = str(error)
            if not (words and words.isprintable()):
                bad.append(f"{one.name}: {words!r}")
            assert one.kind != "misspelt" or "unknown setting" in words, words
            assert one.kind != "duplicate" or "appears twice" in words, words
        except BaseException as error:  # noqa: BLE001 - SystemExit would be a fault as well
            bad.append(f"{one.name}: {error!r}")
    assert bad == []


@pytest.mark.parametrize("command", odd_settings.COMMANDS)
def test_no_number_may_be_negative(command: str, tmp_path: Path):
    accepted = []
    for one in odd_settings.odd(command):
        if one.kind in ("negative", "fraction"):
            try:
                one.open(tmp_path)
            except UserError:
                continue
            accepted.append(one.name)
    assert accepted == []


def test_what_is_seen(tmp_path: Path):
    def words(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            parse(Config, ["--config", str(path)])
        return f"error: {caught.value}"

    twice = words("train: {lr: 1e-4}\nrun: {name: x}\ntrain: {steps: 3000}\n")
    seen("section twice", 1, twice)
    assert "line 3: train appears twice, in line 1 too" in twice
    seen("null", 1, words("mask: {source: null}"))
    seen("null", 1, words("mask:\n  source:\n"))


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(text for one in value.values() for text in _texts(one))]
    if isinstance(value, list | tuple):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("command", odd_settings.COMMANDS)
def test_no_setting_names_a_folder_called_tilde(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch")
    cls: type[Any]
    cls, given = odd_settings.COMMANDS[command]
    tried = 0
    for place, hint in odd_settings.settings(command):
        if str not in (hint, *get_args(hint)) and "str" not in str(hint):
            continue
        for text in ("~/x", "$SCRATCH/x", "${SCRATCH}/x"):
            for value in (text, [text], {text: 1.0}):
                path = tmp_path / "paths.yaml"
                path.write_text(odd_settings.written(given, place, value))
                try:
                    config, _ = parse(cls, ["--config", str(path)])
                except UserError:
                    continue
                found = _texts(odd_settings.at(config, place))
                assert found, (place, value)
                assert all(one in ("/home/someone/x", "/scratch/x") for one in found), place
                tried += 1
    assert tried >= 3


@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "$NOT_SET/x", "$NOT_SET"])
def test_no_such_home(text: str):
    with pytest.raises(UserError, match=r"run\.root=.*(no such home|is not set)"):
        parse(Config, ["--run.root", text])


def test_options_beside_the_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    _, found = parse(Config, ["--deepspeed-config", "~/zero.json"], options=OnRanks)
    assert found.deepspeed_config == Path("/home/someone/zero.json")


PLAIN: dict[str, tuple[type[Any], list[str]]] = {
    "export": (export.Export, ["--run", "r"]),
    "audit": (audit.Audit, ["--release", "r"]),
    "evaluate": (evaluate.Evaluate, ["glue", "--model", "m"]),
    "report": (report.Report, ["--study", "s"]),
    "vault keygen": (vault.Keygen, ["--out", "o"]),
    "vault seal": (vault.Seal, ["--run", "r", "--name", "n", "--to", "k", "--out", "o"]),
    "vault open": (vault.Open, ["f", "--out", "o"]),
    "vault verify": (vault.Verify, ["f", "--run", "r"]),
    "vault show": (vault.Show, ["f"]),
    "vault list": (vault.List, ["--run", "r"]),
    "vault trace": (vault.Trace, ["--run", "r", "--model", "m"]),
    "prepare-data inspect": (prepare_data.Inspect, ["f"]),
}
EXCLUDE_OTHERS = ("run", "derivative", "check", "study", "passphrase_file", "ticket", "model")


@pytest.mark.parametrize("command", PLAIN)
def test_plain_options(command: str, monkeypatch: pytest.MonkeyPatch):
    """Of every option of a command without a settings tree: paths are expanded, numbers finite."""
    monkeypatch.setenv("HOME", "/home/someone")
    cls, words = PLAIN[command]
    assert parse_options(cls, words)
    tried = 0
    for field in fields_of(cls):
        kinds = (field.hint, *get_args(field.hint))
        if Path in kinds and not field.positional:
            if field.name in EXCLUDE_OTHERS and field.flag not in words:
                continue
            value = getattr(parse_options(cls, [*words, f"{field.flag}=~/x"]), field.name)
            assert value in (Path("/home/someone/x"), (Path("/home/someone/x"),)), field.flag
            tried += 1
        if int in kinds or float in kinds:
            odd = ["abc", "nan", "inf", "1e400", ""]
            for number in odd + ["-1", "9" * 30] * (int in kinds):
                with pytest.raises(UserError):
                    parse_options(cls, [*words, f"{field.flag}={number}"])
            tried += 1
        if field.metavar in ("FOLDER", "FILE", "FILE|FOLDER", "DIR", "RUN", "STORE"):
            assert Path in kinds, field.name
    assert tried or command == "vault show"


@pytest.mark.parametrize("words", [["--input", "[ab]1.jsonl"], ["--config", "FILE"]])
def test_a_pattern_in_brackets(words: list[str], tmp_path: Path):
    path = tmp_path / "data.yaml"
    path.write_text("input: '[ab]1.jsonl'\n")
    config, _ = parse(PrepareConfig, [word.replace("FILE", str(path)) for word in words])
    assert config.input == ("[ab]1.jsonl",)
