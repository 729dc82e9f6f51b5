"""Flags and files to a config; every mistake is one line that names it."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pmp_ds import shipped
from pmp_ds.cli import NoOptions, dump, option, parse, parse_options, run_verb
from pmp_ds.config import Config, TrainConfig
from pmp_ds.errors import UserError
from pmp_ds.prepare.config import PrepareConfig


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Beside the settings."""

    deepspeed_config: Path | None = None
    """Settings of DeepSpeed."""

    resume: bool = False
    """Go on."""

    local_rank: int = option(default=-1, hidden=True)
    """Not shown."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """On what it is measured."""

    seeds: tuple[int, ...] = (0, 1)
    """Seeds."""

    steps: tuple[float, ...] = option("A", ())
    """Steps."""


@dataclass(frozen=True, kw_only=True)
class Tool(Measured):
    """Measure a model."""

    what: tuple[str, ...] = option("WHAT", positional=True)
    """One or several."""

    model: Path = option("FOLDER")
    """The model."""

    again: bool = False
    """Once more."""

    prompt: str | None = None
    """Text."""

    kinds: tuple[Path, ...] = option("KIND", ())
    """Kinds."""


def tool(*argv: str) -> Tool:
    return parse_options(Tool, [*argv, "--model", "m"], prog="x tool")


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["a"], {}),
        (["a", "b c"], {"what": ("a", "b c")}),
        (["--again", "a"], {"again": True}),  # a switch leaves the next word alone
        (["a", "--again=false"], {}),
        (["a", "--seeds", "3", "4"], {"seeds": (3, 4)}),
        (["a", "--steps", "-0.5", "0", ".5", "-.25"], {"steps": (-0.5, 0.0, 0.5, -0.25)}),
        (["a", "--kinds", "b", "--kinds", "~/c"], {"kinds": (Path("b"), Path("/home/me/c"))}),
        (["a", "--prompt", "~ [1, {2: $X"], {"prompt": "~ [1, {2: $X"}),  # no path, no YAML
        (["a", "--prompt", "007"], {"prompt": "007"}),
        (["a", "--model", "$HOME/m"], {"model": Path("m")}),  # the later one
    ],
)
def test_options_alone(argv: list[str], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert tool(*argv) == replace(Tool(what=("a",), model=Path("m")), **changes)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "WHAT is missing; see --help"),
        (["a", "--seeds", "x"], "--seeds: expected int, got x"),
        (["a", "--seeds"], "argument --seeds: expected one argument"),
        (["a", "--steps", ".nan"], "--steps=nan is not a finite number"),
        (["a", "--seeds", str(10**20)], f"--seeds={10**20} is too large: at most 2^63 - 1"),
        (["a", "--agains"], "unknown flag --agains (did you mean --again?)"),
        (["~none/a", "--kinds", "~none/b"], "--kinds=~none/b: no such home; write it out"),
        (["a", "--config", "x.yaml"], "unknown flag --config"),
    ],
)
def test_mistakes_in_options(argv: list[str], message: str):
    with pytest.raises(UserError) as caught:
        tool(*argv)
    assert str(caught.value).startswith(message)
    with pytest.raises(UserError, match=r"^WHAT, --model are missing; see --help$"):
        parse_options(Tool, [])


def test_help_of_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        tool("--help")
    text = capsys.readouterr().out
    assert text.startswith(
        "usage: x tool WHAT [WHAT ...] --model FOLDER [options]\n\nMeasure a mod"
    )
    assert "\nOn what it is measured:\n  --seeds N [N ...]     Seeds. (default: 0 1)\n" in text
    assert "\n  --again               Once more.\n" in text
    assert "--config" not in text


def test_verbs(capsys: pytest.CaptureFixture[str]):
    ran: list[Any] = []
    verbs = {"tool": (Tool, ran.append), "extra": (Extra, ran.append)}
    run_verb(verbs, ["extra", "--resume"], prog="x")
    assert ran == [Extra(resume=True)]
    with pytest.raises(
        UserError, match=r"^unknown verb tol \(did you mean tool\?\); x --help lists"
    ):
        run_verb(verbs, ["tol"], prog="x")
    with pytest.raises(UserError, match=r"^x needs a verb; x --help lists them all$"):
        run_verb(verbs, [], prog="x")
    with pytest.raises(SystemExit, match="0"):
        run_verb(verbs, ["--help"], prog="x", description="What.\n")
    text = capsys.readouterr().out
    assert text.startswith(
        "usage: x VERB [options]\n\nWhat.\n\nverbs:\n  tool   Measure a model.\n"
    )


def test_defaults():
    assert parse(Config, []) == (Config(), NoOptions())


def test_overlays_and_flags_in_order(write):
    base = write("a.yaml", "train:\n  lr: 1e-4\n  steps: 3000\nmask: {density: 0.5}\n")
    overlay = write("b.yaml", "train:\n  steps: 5000\n")
    config, _ = parse(Config, ["--config", base, f"--config={overlay}", "--train.clip_norm", "2"])
    assert config.train == TrainConfig(lr=1e-4, steps=5000, clip_norm=2.0)
    assert isinstance(config.train.lr, float)
    assert config.mask.density == 0.5
    config, _ = parse(Config, ["--config", overlay, "--config", base, "--train.steps=7000"])
    assert (config.train.steps, config.train.lr) == (7000, 1e-4)


def test_types_are_real():
    argv = ["--train.betas", "[0.8,0.9]", "--init.seed", "42", "--mask.always_train", "false"]
    config, _ = parse(Config, argv)
    assert config.train.betas == (0.8, 0.9)
    assert config.init.seed == 42
    assert config.mask.always_train is False


def test_extra_options():
    argv = ["--local_rank=1", "--deepspeed-config", "z.json", "--train.steps", "2500"]
    config, found = parse(Config, argv, options=Extra)
    assert found == Extra(deepspeed_config=Path("z.json"), local_rank=1)
    assert config.train.steps == 2500
    assert parse(Config, ["--resume"], options=Extra)[1] == Extra(resume=True)


def test_dump_reads_back(write, capsys):
    argv = ["--train.lr", "3e-5", "--train.betas", "[0.1,0.2]", "--run.name", "é x"]
    config, _ = parse(Config, argv)
    assert parse(Config, ["--config", write("c.yaml", dump(config))])[0] == config
    prepare = PrepareConfig(input=("a", "b"), val_fraction=1e-5)
    assert parse(PrepareConfig, ["--config", write("p.yaml", dump(prepare))])[0] == prepare
    with pytest.raises(SystemExit) as stop:
        parse(Config, [*argv, "--print_config"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == dump(config)
    sections = ["run", "init", "model", "data", "mask", "train", "guard"]
    assert list(yaml.safe_load(dump(config))) == sections


@pytest.mark.parametrize(
    ("argv", "inputs"),
    [
        (["--input", "a"], ("a",)),
        (["--input", "a", "b c", "--block_size", "8"], ("a", "b c")),
        (["--input=a", "--block_size", "8", "--input", "b"], ("a", "b")),
        (["--input", '["a", "b"]'], ("a", "b")),
        (["--input", "a", "--text_field", "b"], ("a",)),
        ([], ("python",)),
    ],
)
def test_lists_of_text(argv: list[str], inputs: tuple[str, ...]):
    config, _ = parse(PrepareConfig, argv)
    assert config == replace(
        PrepareConfig(input=inputs), block_size=config.block_size, text_field=config.text_field
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.lr", "-1"], "train.lr=-1.0 must be positive"),
        (["--train.lr", "abc"], "train.lr: expected float, got abc"),
        (["--train.steps", "1.5"], "train.steps: expected int, got 1.5"),
        (["--init.seed", "abc"], "init.seed: expected int or null, got abc"),
        (
            ["--mask.source", "foo"],
            "mask.source: expected one of 'earlybird', 'random', 'none', 'file', got foo",
        ),
        (["--train.lr"], "argument --train.lr: expected one argument"),
        (
            ["--train.stepz", "1"],
            "unknown flag --train.stepz (did you mean --train.steps?); see --help for all of them",
        ),
        (
            ["--train.step", "5"],  # no guessing from beginnings
            "unknown flag --train.step (did you mean --train.steps?); see --help for all of them",
        ),
        (["foo"], "unexpected argument 'foo'; every setting is a flag, see --help"),
        (
            ["--config", "none.yaml"],
            "--config none.yaml cannot be read: none.yaml is missing; recipes by name: "
            + ", ".join(shipped.recipes()),
        ),
    ],
)
def test_mistakes_in_flags(argv: list[str], message: str):
    with pytest.raises(UserError) as caught:
        parse(Config, argv)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {stepz: 3}",
            "unknown setting train.stepz (did you mean train.steps?); see --help for all of them",
        ),
        (
            "trian: {lr: 3}",
            "unknown setting trian.lr (did you mean train.lr?); see --help for all of them",
        ),
        ("train: {lr: abc}", "train.lr: expected float, got abc"),
        ("train: 3", "train is a section of settings, not a value: 3"),
        ("- 1", "--config FILE contains no settings: write `name: value` lines"),
        ("", "--config FILE contains no settings: write `name: value` lines"),
        ("train: {steps: 10}", "train.warmup_steps=2000 must be between 0 and train.steps=10"),
    ],
)
def test_mistakes_in_files(write, text: str, message: str):
    path = write("x.yaml", text)
    with pytest.raises(UserError) as caught:
        parse(Config, ["--config", path])
    assert str(caught.value) == message.replace("FILE", path)


def test_broken_yaml_names_the_file_and_stays_one_line(write):
    path = write("x.yaml", "train:\n  lr: [1\n")
    good = write("good.yaml", "train: {lr: 1}")
    with pytest.raises(UserError, match=r"x\.yaml is not YAML.*line 2") as caught:
        parse(Config, ["--config", good, "--config", path])
    assert "\n" not in str(caught.value)


def test_error_of_a_value_that_only_the_sum_of_files_has(write):
    """Settings are checked together, after the last overlay."""
    small = write("a.yaml", "train: {steps: 10}")
    config, _ = parse(Config, ["--config", small, "--train.warmup_steps", "5"])
    assert config.train.steps == 10


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parse(
            Config,
            ["--help"],
            prog="x.py",
            description="What.\n  indented",
            epilog="examples:",
            options=Extra,
        )
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: x.py [options]\n\nWhat.\n  indented\n")
    assert text.rstrip().endswith("examples:")
    assert "Fraction of the parameters kept and trained" in text  # the field's docstring
    assert "default: 0.7" in text
    assert "local_rank" not in text


@pytest.mark.processes
def test_exit_code_and_one_line_on_standard_error():
    script = (
        "import sys\n"
        "from pmp_ds.cli import parse\n"
        "from pmp_ds.config import Config\n"
        "from pmp_ds.errors import exit_code\n"
        "raise SystemExit(exit_code(lambda: parse(Config, sys.argv[1:])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--train.lr", "x"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: train.lr: expected float, got x\n"
