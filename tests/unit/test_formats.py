"""The table of formats matches the code and the documentation."""

import json
import re
from pathlib import Path

import pytest

from pmp_ds import formats, results
from pmp_ds.formats import FORMATS, FormatError
from pmp_ds.version import UNKNOWN, code_version

REPO = Path(__file__).resolve().parents[2]
SOURCES = {path: path.read_text() for path in sorted((REPO / "pmp_ds").rglob("*.py"))}


def test_document_is_up_to_date():
    found = (REPO / "docs" / "FORMATS.md").read_text()
    assert found == formats.document(), "python -m pmp_ds.formats > docs/FORMATS.md"


@pytest.mark.parametrize("name", FORMATS)
def test_code_asks_the_table(name: str):
    """Written files have the table's number, and files read are checked against it."""
    texts = [text for path, text in SOURCES.items() if path.name != "formats.py"]
    writes, reads = rf'formats\.current\("{name}"\)', rf'formats\.require\(\s*"{name}"'
    assert any(re.search(writes, text) for text in texts)
    assert any(re.search(reads, text) for text in texts)


def test_no_number_stands_elsewhere():
    for path, text in SOURCES.items():
        assert not re.search(r"FORMAT_VERSION = \d|\"format_version\": \d", text), path


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_table_makes_sense(form: formats.Format):
    numbers = [version.number for version in form.versions]
    assert numbers == list(range(1, len(numbers) + 1))
    assert set(form.reads) <= set(numbers)
    assert numbers[-1] in form.reads, "it must read what it writes"


@pytest.mark.parametrize(
    ("found", "writer", "says"),
    [
        (1, None, "which a development version of pmp-ds 0.1.0 before commit 7175ad3 reads;"),
        (6, None, "which a later version of pmp-ds reads;"),
        (6, "pmp-ds 0.2.0 (commit abc)", "which pmp-ds 0.2.0 (commit abc) reads;"),
        (6, ["x"], "which a later version of pmp-ds reads;"),
    ],
)
def test_another_version_is_told(found: int, writer: object, says: str):
    with pytest.raises(FormatError) as caught:
        formats.require("checkpoint", "PLACE", found, way_out="do this", writer=writer)
    message = str(caught.value)
    assert message.startswith(f"checkpoint PLACE has format {found}, {says}")
    assert message.endswith(f"this is {code_version()}, which reads formats 2, 3, 4 and 5: do this")


@pytest.mark.parametrize("found", [None, "2", True, 2.0, [2]])
def test_what_is_no_number_is_damage(found: object):
    with pytest.raises(TypeError):
        formats.require("checkpoint", "PLACE", found, way_out="")


def test_results_of_an_older_version(tmp_path: Path):
    """The study's own: a line without a number. Lines of both versions stand in one file."""
    study = REPO / "docs" / "study" / "results.jsonl"
    found = results.read(study)
    assert len(found) > 400
    assert {result.commit for result in found} == {UNKNOWN}
    path = tmp_path / "results.jsonl"
    path.write_bytes(study.read_bytes())
    new = results.Result(
        kind="new",
        arm="a",
        model="m",
        model_digest="d",
        settings={},
        values={},
        seconds=1.0,
        hardware="h",
    )
    results.append(path, new)
    assert results.read(path) == [*found, new]
    line = json.loads(path.read_text().splitlines()[-1])
    assert (line["format_version"], line["commit"]) == (2, code_version().commit)
    line |= {"format_version": 3, "more": 1}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(FormatError, match=r"results .*, line 1, has format 3, which a later"):
        results.read(path)
