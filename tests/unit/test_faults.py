"""The list of faults matches the tests that provoke them and the documentation."""

import re
from pathlib import Path

from tests.helpers.faults import FAULTS, document

REPO = Path(__file__).resolve().parents[2]


def test_document_is_up_to_date():
    found = (REPO / "docs" / "FAULTS.md").read_text()
    assert found == document(), "python -m tests.helpers.faults > docs/FAULTS.md"


def test_every_fault_is_provoked_and_in_the_list():
    """By a call of ``seen`` with its name, or with a parameter that has it."""
    files = [p for d in ("distributed", "e2e", "unit") for p in (REPO / "tests" / d).rglob("*.py")]
    sources = [text for p in files if "seen(" in (text := p.read_text()) and p != Path(__file__)]
    named = {name for text in sources for name in re.findall(r'seen\(\s*"([^"]+)"', text)}
    assert named <= FAULTS.keys()
    for name in FAULTS.keys() - named:
        assert any(re.search(rf'[(\s\[]"{re.escape(name)}"\)?[],)]', t) for t in sources), name
