"""requirements.lock, from which the image is installed, agrees with constraints.txt and
pyproject.toml."""

import re
import tomllib
from pathlib import Path

from tests.helpers.lock import HEADER, OF_TORCH

REPO = Path(__file__).resolve().parents[2]
LOCK = (REPO / "requirements.lock").read_text(encoding="utf-8")
PIN = re.compile(r"^([\w.-]+)==(\S+)(.*(?:\n    .*)*)", re.MULTILINE)
ELSEWHERE = ("win32", "emscripten")  # platforms of packages that constraints.txt does not list


def pins(text: str) -> dict[str, str]:
    return {found[1]: found[2] for found in PIN.finditer(text)}


def test_versions_are_those_of_the_constraints():
    tested = pins((REPO / "constraints.txt").read_text(encoding="utf-8"))
    other = {
        found[1]: found[2]
        for found in PIN.finditer(LOCK)
        if tested.get(found[1]) != found[2] and not any(name in found[3] for name in ELSEWHERE)
    }
    assert other == {}, "run: make lock"


def test_every_file_has_a_hash():
    assert HEADER in LOCK
    without = [found[1] for found in PIN.finditer(LOCK) if "--hash=sha256:" not in found[3]]
    assert without == []
    assert len(pins(LOCK)) == LOCK.count("==") - LOCK.count(" == ")


def test_every_dependency_is_there_except_torch():
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]}
    assert named - pins(LOCK).keys() == {"torch"}, "run: make lock"
    assert OF_TORCH.findall(LOCK) == []
