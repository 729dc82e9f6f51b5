"""The ledger refuses releases that would reveal the mask, and survives a killed process."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from pmp_ds.errors import UserError
from pmp_ds.formats import FormatError
from pmp_ds.release.ledger import Claim, lineage_of, read
from tests.helpers.faults import seen


def claim(path: Path, kind: Any = "final", lineage: str = "a" * 64, **given: Any) -> Claim:
    values: dict[str, Any] = {"updates": 40, "date": "2026-01-31", "reason": None} | given
    return Claim(path=path, lineage=lineage, kind=kind, **values)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Return a ledger with one final release of weights `w1`."""
    path = tmp_path / "ledger.jsonl"
    claim(path).record("w1", "r1", "bf16")
    return path


def test_what_is_remembered(ledger: Path) -> None:
    (entry,) = read(ledger)
    assert (entry.lineage, entry.kind, entry.updates) == ("a" * 64, "final", 40)
    assert (entry.weights, entry.released, entry.dtype) == ("w1", "r1", "bf16")
    assert (entry.date, entry.reason) == ("2026-01-31", None)
    assert stat.S_IMODE(ledger.stat().st_mode) == 0o600
    assert lineage_of(read(ledger), "r1") == "a" * 64
    assert lineage_of(read(ledger), "r2") == "r2"


def test_nothing_left_yet(tmp_path: Path) -> None:
    assert read(tmp_path / "none") == ()
    claim(tmp_path / "none").check("w1")


def test_the_same_weights_are_no_second_revision(ledger: Path) -> None:
    claim(ledger).record("w1", "r1-as-fp32", "fp32")
    assert len(read(ledger)) == 2


@pytest.mark.parametrize("kind", ["final", "intermediate"])
def test_a_second_revision_is_refused(ledger: Path, kind: Any) -> None:
    before = ledger.read_bytes()
    for refused in (
        lambda: claim(ledger, kind).check("w2"),
        lambda: claim(ledger, kind).record("w2", "r2", "bf16"),
    ):
        with pytest.raises(UserError, match="their difference is the mask") as caught:
            refused()
        assert "the final release (update 40)" in str(caught.value)
        assert "--another-revision REASON" in str(caught.value)
    assert ledger.read_bytes() == before


def test_a_reason_is_remembered(ledger: Path) -> None:
    claim(ledger, reason="the first one was withdrawn").record("w2", "r2", "bf16")
    assert [entry.reason for entry in read(ledger)] == [None, "the first one was withdrawn"]


def test_other_initial_weights_do_not_matter(ledger: Path) -> None:
    claim(ledger, lineage="b" * 64).check("w2")


def test_an_intermediate_checkpoint_is_refused_before_any_other(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(UserError, match="update 40 is an intermediate checkpoint"):
        claim(path, "intermediate").check("w1")
    claim(path, "intermediate", reason="a study of training").record("w1", "r1", "bf16")
    claim(path, "intermediate").check("w1")  # has left already
    with pytest.raises(UserError, match=r"the intermediate release \(update 40\)"):
        claim(path).check("w2")


def test_one_derivative_beside_its_base(ledger: Path) -> None:
    derivative = claim(ledger, "derivative", updates=None)
    derivative.record("d1", "d1", "bf16")
    derivative.check("d1")
    with pytest.raises(UserError, match="a derivative from the same initial weights was released"):
        derivative.check("d2")
    with pytest.raises(UserError, match="the derivative release from the same"):
        claim(ledger).check("w2")


def test_a_line_without_its_newline_counts(ledger: Path) -> None:
    """An editor or a power cut may remove the newline: the release has left all the same."""
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:-1])
    with pytest.raises(UserError) as caught:
        claim(ledger).check("w2")
    seen("ledger line", 1, f"error: {caught.value}")
    claim(ledger).record("w1", "r1", "bf16")
    assert ledger.read_bytes() == whole + whole


@pytest.mark.parametrize("cut", [2, 30])
def test_a_line_that_was_not_finished_never_happened(ledger: Path, cut: int) -> None:
    whole = ledger.read_bytes()
    ledger.write_bytes(whole + whole[:-cut])
    assert len(read(ledger)) == 1
    claim(ledger).record("w1", "r1", "bf16")
    assert ledger.read_bytes() == whole + whole


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"format_version": 1}'])
def test_a_damaged_ledger_lets_nothing_leave(ledger: Path, line: str) -> None:
    ledger.write_text(f"{ledger.read_text()}{line}\n")
    with pytest.raises(UserError, match=r"ledger.jsonl, line 2, is damaged"):
        claim(ledger).check("w1")


def test_another_format(ledger: Path) -> None:
    """Another format is not damage: a backup would not help."""
    values = json.loads(ledger.read_text()) | {"more": 1}
    ledger.write_text(json.dumps(values) + "\n")
    with pytest.raises(UserError, match="it has the unknown field 'more'"):
        read(ledger)
    ledger.write_text(json.dumps(values | {"format_version": 2}) + "\n")
    with pytest.raises(FormatError, match=r"line 1, has format 2, which a later version of pmp-ds"):
        read(ledger)
