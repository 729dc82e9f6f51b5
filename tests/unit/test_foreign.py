"""The one reader of small untrusted files, the types of their fields, and their display."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmp_ds.errors import UserError, exit_code, shown
from pmp_ds.fields import fit
from pmp_ds.foreign import DEEPEST, ForeignError, MissingError, parse, read_bytes, read_object
from tests.helpers.examples import examples

FEW = examples(60, derandomize=True, database=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**38), 10**38) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)

REFUSED = {
    "[" * 10**5: f"nested more than {DEEPEST} deep",
    "[" * (DEEPEST + 2) + "]" * (DEEPEST + 2): f"nested more than {DEEPEST} deep",
    '{"a": 1, "a": 2}': "a key appears twice",
    '{"b": [{"a": 1, "a": 1}]}': "a key appears twice",
    "1" + "0" * 400: "more than 40 digits",
    "1" + "0" * 5000: "more than 40 digits",
    '"\\ud800"': "half of a surrogate pair",
    "{} {}": "not JSON",
    "": "not JSON",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_is_no_json_here(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
    with pytest.raises(ValueError, match=message):
        parse(text.encode())


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ValueError, match="not UTF-8"):
        parse(b'"\xff"')


@FEW
@given(JSON)
def test_json_is_what_json_says(value: Any) -> None:
    text = json.dumps(value)
    assert json.dumps(parse(text)) == text


@FEW
@given(st.text() | st.binary())
def test_any_text_is_parsed_or_refused_in_words(text: str | bytes) -> None:
    try:
        parse(text)
    except ValueError as error:
        assert shown(str(error)) == str(error)  # noqa: PT017 - most texts raise nothing


def special(path: Path, kind: str) -> Path:
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path.name)
        case "holes":
            os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 8 << 30)
    return path


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fifo", "is not a regular file"),
        ("folder", "is not a regular file"),
        ("device", "is not a regular file"),
        ("loop", "cannot be read: Too many levels"),
        ("holes", "is longer than 67,108,864 bytes"),
    ],
)
def test_what_is_no_file(tmp_path: Path, kind: str, message: str) -> None:
    path = special(tmp_path / "x.json", kind)
    with pytest.raises(ForeignError, match=f"x.json {message}"):
        read_object(path)


def test_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="nowhere is missing"):
        read_bytes(tmp_path / "nowhere")


def test_a_pipe_that_the_user_named() -> None:
    """As `--passphrase-file <(...)`."""
    reader, writer = os.pipe()
    os.write(writer, b"secret\n")
    os.close(writer)
    assert read_bytes(Path(f"/dev/fd/{reader}"), 100, pipe=True) == b"secret\n"
    os.close(reader)


def test_a_large_limit_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x")
    assert read_bytes(tmp_path / "small", 1 << 50) == b"x"


@dataclass(frozen=True)
class Inner:
    name: str
    shape: tuple[int, ...]


class Outer(TypedDict):
    inner: list[Inner]
    kind: Literal["a", "b"]
    rate: float | None
    pair: NotRequired[tuple[float, float]]


GOOD: dict[str, Any] = {
    "inner": [{"name": "x", "shape": [1, 2]}],
    "kind": "a",
    "rate": 1,
    "more": [[]],
}

MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"kind": "a", "rate": None}, "it lacks inner"),
    "a list": (GOOD | {"inner": {}}, "inner is dict, not a list"),
    "below": (GOOD | {"inner": [{"name": 5, "shape": []}]}, r"inner\[0\].name is 5, not text"),
    "below a list": (
        GOOD | {"inner": [{"name": "x", "shape": [True]}]},
        r"inner\[0\].shape\[0\] is True, not a whole number",
    ),
    "unknown": (
        GOOD | {"inner": [{"name": "x", "shape": [], "y": 1}]},
        r"unknown field 'inner\[0\].y'",
    ),
    "literal": (GOOD | {"kind": "c"}, "kind is 'c', not 'a' or 'b'"),
    "union": (GOOD | {"rate": "1"}, "rate is '1', not a number or null"),
    "huge": (GOOD | {"rate": 1 << 72}, "rate is 4722366482869645213696, not a number"),
    "pair": (GOOD | {"pair": [1.0]}, "pair is list, not a list of 2"),
}


def test_values_that_fit() -> None:
    found = fit(Outer, GOOD, "x.json")
    assert found["inner"] == [Inner(name="x", shape=(1, 2))]
    assert found["more"] == [[]]


@pytest.mark.parametrize(("values", "message"), MISFITS.values(), ids=MISFITS)
def test_values_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^x.json is damaged: .*{message}"):
        fit(Outer, values, "x.json")


@FEW
@given(JSON)
def test_any_value_fits_or_is_named(value: Any) -> None:
    try:
        fit(Outer, value, "x.json")
    except UserError as error:
        assert str(error).startswith("x.json is damaged: ")  # noqa: PT017


def test_what_a_terminal_would_obey_is_spelled(capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b[31mred\nerror: \u202etxt \udc80\x85"

    def main() -> None:
        raise UserError(f"{name} is wrong:\n  first\n  {name}")

    assert exit_code(main) == 1
    said = r"\x1b[31mred\nerror: \u202etxt \udc80\x85"
    assert capsys.readouterr().err == f"error: {said} is wrong:\n  first\n  {said}\n"
