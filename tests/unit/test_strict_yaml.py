"""YAML is read as it looks, in bounded time, or refused with its line."""

import os
import re
from pathlib import Path

import pytest
import yaml

from pmp_ds import strict_yaml
from pmp_ds.errors import UserError
from tests.helpers.faults import seen

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


def refused(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        strict_yaml.read_settings(path, "--config x.yaml")
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: a appears twice, in line 1 too"),
        ("a:\n  b:\n    c: 1\n    c: 2", "line 4: c appears twice, in line 3 too"),
        ("a: [{b: 1, b: 2}]", "line 1: b appears twice"),
        ("yes: 1\ntrue: 2", "line 2: true appears twice"),
        ("a.b: 1\na: {b: 2}", "a.b appears twice"),
        ("a: {<<: *x}", "is not YAML: line 1"),
        ("a: &x [*x]", "its aliases expand to more than 20,000 values"),
        ("a: &x {b: {c: *x}}", "its aliases expand to more than 20,000 values"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 20)),
            "nested more than 16 deep by its aliases",
        ),
        ("input: *.jsonl", "is not YAML: line 1: .* needs quotes"),
        ("input: [ab]1.jsonl", "is not YAML: line 1: .* needs quotes"),
        ("? [a, b]\n: 1", "line 1: a key must be a word"),
        ("a: " + "[" * 100_000, "line 1: nested more than 16 deep"),
        ("a: " + "{b: " * 50_000, "line 1: nested more than 16 deep"),
        ("a: '" + "x" * 300_000 + "'", "longer than 262,144 bytes"),
        ("a: !!python/object/apply:os.system [id]", "is not YAML: line 1"),
        ("1: 2", "1 is not a setting"),
        (b"a: \xff", "cannot be read"),
        ("a: \x00", "is not YAML"),
    ],
)
def test_refused(tmp_path: Path, text: str | bytes, words: str):
    found = refused(tmp_path, text)
    assert found.startswith("--config x.yaml")
    assert re.search(words, found), found


def test_an_alias_is_what_it_stands_for(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &x {lr: [1e-3, 2], n: 1}\nb: *x\nc: {d: *x}\ne: {<<: *x, n: 5}\n")
    found = strict_yaml.read_settings(path, "--config x.yaml")
    assert found["a"] == found["b"] == found["c"]["d"] == {"lr": [1e-3, 2], "n": 1}
    assert found["e"] == {"lr": [1e-3, 2], "n": 5}
    found["b"]["n"] = 2
    assert found["a"]["n"] == 1, "one object under two names"


@pytest.mark.timeout(60)  # written out they are 9^9 values
def test_nested_aliases_take_no_time(tmp_path: Path):
    seen("aliases", 1, f"error: {refused(tmp_path, BOMB)}")


def test_not_a_file(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="cannot be read: "):
            strict_yaml.read_settings(name, "--config x.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2.0e-05", 2e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1_000", 1000),
        ("-1", -1),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        (".", "."),
        ("1e", "1e"),
        ("1:30:00", 5400),
        ("'1e-3'", "1e-3"),
        ("{a: 1e-4}", {"a": 1e-4}),
    ],
)
def test_scalars(text: str, value: object):
    found = strict_yaml.parse(text)
    assert found == value
    assert type(found) is type(value)


def test_recipes_are_read_as_before():
    for path in sorted((Path(__file__).parents[2] / "launcher" / "recipes").glob("*.yaml")):
        text = path.read_text()
        ours, plain = strict_yaml.parse(text), yaml.safe_load(text)
        assert yaml.safe_dump(ours).replace("'", "") == yaml.safe_dump(plain).replace("'", "") or (
            "e-" in text  # safe_load takes 1e-4 for text
        )
