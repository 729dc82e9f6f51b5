"""Every setting with odd values is valid or gives a one-line error; paths may begin with `~`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from pmp_ds.cli import PlainParser, parse
from pmp_ds.commands import audit, evaluate, export, report, vault
from pmp_ds.config import Config
from pmp_ds.errors import UserError
from pmp_ds.prepare.config import PrepareConfig
from tests.helpers import odd_settings
from tests.helpers.faults import seen


@pytest.mark.parametrize("command", odd_settings.COMMANDS)
def test_odd_values_of_every_setting(command: str, tmp_path: Path):
    """1,850 files; `make crafted` counts them."""
    bad = []
    for one in odd_settings.odd(command):
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
    options: dict[str, dict[str, Any]] = {"--deepspeed-config": {"type": str}}
    _, found = parse(Config, ["--deepspeed-config", "~/zero.json"], options=options)
    assert found["deepspeed_config"] == "/home/someone/zero.json"


PLAIN: dict[str, tuple[Callable[[list[str]], Any], list[str]]] = {
    "export": (export.parse, ["--run", "r"]),
    "audit": (audit.arguments, ["--release", "r"]),
    "evaluate": (evaluate.arguments, ["glue", "--model", "m"]),
    "report": (report.arguments, ["--study", "s"]),
    "vault seal": (vault.parse, ["seal", "--run", "r", "--name", "n", "--out", "o"]),
    "vault trace": (vault.parse, ["trace", "--run", "r"]),
}


@pytest.mark.parametrize("command", PLAIN)
def test_plain_options(command: str, monkeypatch: pytest.MonkeyPatch):
    """Of every option of a command without a settings tree: paths are expanded, numbers finite."""
    monkeypatch.setenv("HOME", "/home/someone")
    parsers: list[PlainParser] = []
    parse_known_args = PlainParser.parse_known_args

    def spied(self: PlainParser, *args: Any, **kwargs: Any) -> Any:
        parsers.append(self)
        return parse_known_args(self, *args, **kwargs)

    monkeypatch.setattr(PlainParser, "parse_known_args", spied)
    parse_words, words = PLAIN[command]
    parse_words(words)
    actions = [action for parser in list(parsers) for action in parser._actions]
    tried = 0
    for action in actions:
        if action.nargs == 0 or not action.option_strings:
            continue
        (flag,) = action.option_strings
        exclusive = flag in ("--run", "--derivative", "--check", "--study") and flag not in words
        if action.type is Path and not exclusive:
            value = getattr(parse_words([*words, f"{flag}=~/x"]), action.dest)
            assert value in (Path("/home/someone/x"), [Path("/home/someone/x")]), flag
            tried += 1
        if action.type in (int, float):
            for number in ("abc", "nan", "inf", "1e400", ""):
                with pytest.raises(UserError):
                    parse_words([*words, f"{flag}={number}"])
        if action.metavar in ("FOLDER", "FILE", "RUN", "STORE"):
            assert action.type is Path, flag
        if action.type is int:
            with pytest.raises(UserError):
                parse_words([*words, f"{flag}=-1"])
            with pytest.raises(UserError):
                parse_words([*words, f"{flag}={'9' * 30}"])
    assert tried


@pytest.mark.parametrize("words", [["--input", "[ab]1.jsonl"], ["--config", "FILE"]])
def test_a_pattern_in_brackets(words: list[str], tmp_path: Path):
    path = tmp_path / "data.yaml"
    path.write_text("input: '[ab]1.jsonl'\n")
    config, _ = parse(PrepareConfig, [word.replace("FILE", str(path)) for word in words])
    assert config.input == ("[ab]1.jsonl",)
