"""Each message that docs/TROUBLESHOOTING.md explains is one that the code still has."""

import ast
import re
from collections.abc import Iterator
from functools import cache

from tests.helpers.distributed import REPO

TEXT = (REPO / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"\*\*`(.+?)`\*\*", TEXT)


@cache
def messages() -> tuple[str, ...]:
    """Return every text in pmp_ds, with `…` for what is filled in."""
    return tuple(
        "".join(_parts(node))
        for path in sorted((REPO / "pmp_ds").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    )


def _parts(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from _parts(value)
    elif isinstance(node, ast.Constant):
        yield node.value if isinstance(node.value, str) else ""
    else:
        yield "…"


def in_code(quoted: str) -> bool:
    """Return whether a text of the code has all constant parts of ``quoted``, in order."""
    parts = [part.strip() for part in quoted.split("…")]
    pattern = re.compile(".*".join(re.escape(part) for part in parts if part), re.DOTALL)
    return any(pattern.search(message) for message in messages())


def test_messages_exist():
    assert [quoted for quoted in QUOTED if not in_code(quoted)] == []


def test_there_are_enough_of_them_and_each_once():
    assert len(QUOTED) >= 40
    assert len(set(QUOTED)) == len(QUOTED)
    for quoted in QUOTED:  # one that only has short words would match anything
        assert max(map(len, quoted.split("…"))) >= 9, quoted


def test_what_is_found():
    assert in_code("port … of … is taken, so the ranks cannot meet at …")
    assert not in_code("port … of … is occupied, so the ranks cannot meet at …")
    assert not in_code("so the ranks cannot meet at … port … of … is taken")
