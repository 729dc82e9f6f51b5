"""Untrusted files give the user exit code 1 and one line."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmp_ds.commands import report, vault
from pmp_ds.commands.trace import _report_missing
from pmp_ds.errors import UserError, exit_code
from pmp_ds.evaluate.subject import read_parameters
from pmp_ds.model.folder import open_folder
from pmp_ds.study.tables import Table, plain
from pmp_ds.ticket import trace
from pmp_ds.ticket.mask import ParamMask, pack
from pmp_ds.ticket.ticket import MANIFEST_FILE, MASK_FILE
from pmp_ds.ticket.vault import Record, check_recipient, recipient
from tests.helpers import tiny
from tests.helpers.crafted import archives, kinds
from tests.helpers.crafted.variants import NASTY
from tests.helpers.faults import seen

Main = Callable[[list[str]], None]
Capture = pytest.CaptureFixture[str]


def said(capsys: Capture, main: Main, *argv: str | Path) -> tuple[int, str]:
    code = exit_code(lambda: main([str(word) for word in argv]))
    return code, capsys.readouterr().err


NOT_FILES: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "holes": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 8 << 30),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", NOT_FILES.values(), ids=NOT_FILES)
@pytest.mark.parametrize("kind", ["ticket", "results"])
def test_no_file(
    tmp_path: Path, capsys: Capture, make: Callable[[Path], object], kind: str
) -> None:
    kinds.KINDS[kind].make(tmp_path)
    for name in [MANIFEST_FILE, MASK_FILE] if kind == "ticket" else ["audit.json"]:
        kept = (tmp_path / name).rename(tmp_path / "kept")
        make(tmp_path / name)
        if kind == "ticket":
            done = said(capsys, vault.main, "show", tmp_path)
        else:
            done = said(capsys, report.main, "--study", tmp_path, "--audit", tmp_path / name)
        seen("no file", *done)
        (tmp_path / name).rmdir() if make is Path.mkdir else (tmp_path / name).unlink()
        kept.rename(tmp_path / name)


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": []}',
        "[" * 10**5,
        "[]",
        '{"kind": "a", "kind": "b"}',
        '{"format_version": "2"}',
        '{"format_version": 1' + "0" * 5000 + "}",
    ],
    ids=range(6),
)
def test_odd_fields(tmp_path: Path, capsys: Capture, line: str) -> None:
    (tmp_path / "results.jsonl").write_text(line + "\n")
    seen("odd fields", *said(capsys, report.main, "--study", tmp_path))


@pytest.mark.parametrize("field", ["leaks", "attacks"])
def test_an_audit_with_odd_fields(tmp_path: Path, capsys: Capture, field: str) -> None:
    kinds.KINDS["results"].make(tmp_path)
    audit = json.loads((tmp_path / "audit.json").read_text()) | {field: [5]}
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    done = said(capsys, report.main, "--study", tmp_path, "--audit", tmp_path / "audit.json")
    seen("odd fields", *done)
    assert f"{field}[0] is 5, not " in done[1]


def test_sparse_archives(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "key.txt").write_text(f"{kinds.IDENTITY}\n")
    (tmp_path / "key.txt").chmod(0o600)
    sparse = {n: a for n, a in archives._archives() if n.startswith(("sparse", "size"))}
    for archive in sparse.values():
        (tmp_path / "copy.age").write_bytes(kinds.sealed(archive))
        done = said(
            capsys,
            vault.main,
            "open",
            tmp_path / "copy.age",
            "--identity",
            tmp_path / "key.txt",
            "--out",
            tmp_path / "out",
        )
        assert not (tmp_path / "out").exists()
        if MASK_FILE in done[1] or "no ticket" in done[1]:
            seen("sparse archive", *done)
        else:
            assert done[0] == 1
            assert "copy.age is damaged" in done[1]


@pytest.mark.parametrize(
    "name", ["partner a", "PARTNER A", "\uff30artner A", "Partner\u00ad A", "Partner A\u202e"]
)
def test_a_second_spelling(capsys: Capture, name: str) -> None:
    known = [Record(name="Partner A", keys=(), date="", watermark=None, file="")]

    def main(_: list[str]) -> None:
        check_recipient(known, recipient(name), [])
        raise AssertionError(f"{name!r} is taken")

    if name.startswith("\uff30"):  # the same letters to everybody: the same recipient
        assert recipient(name) == "Partner A"
        return
    seen("second spelling", *said(capsys, main))


def test_names_on_screen(tmp_path: Path, capsys: Capture) -> None:
    model = tiny.model(tiny.LLAMA_TIED)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "\x1b[31mred\nerror: all is well"
    save_file(tensors | {name: torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    code, text = said(capsys, lambda _: open_folder(tmp_path).require_names())
    seen("names on screen", code, text)
    assert text.count("\n") == 1
    with pytest.raises(UserError, match=r"has \\x1b\[31mred.*, which this model does not have"):
        read_parameters(tmp_path, model)  # evaluate --finetuned


def test_names_in_a_report() -> None:
    text = Table("t", "all", ("Arm",), [(NASTY,)]).markdown()
    assert text.splitlines()[2] == (r"| \\x1b[31mred\\n  error: \\u202etxt\|\<b>\`[x]\(y) |")
    assert plain("0.5 ± 0.1 [0.4, 0.6], x_1") == "0.5 ± 0.1 [0.4, 0.6], x_1"


def test_a_trace_says_what_it_does_not_see(tmp_path: Path, capsys: Capture) -> None:
    shapes = {"a": (4, 4), "b": (16,), "c": (2, 4)}
    save_file(
        {n: torch.zeros(s) for n, s in shapes.items() if n != "b"} | {"c": torch.zeros(8)},
        tmp_path / "model.safetensors",
    )
    bits = {n: pack(torch.ones(torch.Size(s), dtype=torch.bool)) for n, s in shapes.items()}
    mask = ParamMask(bits=bits, shapes=shapes)
    assert trace.not_in(tmp_path, mask) == ["b", "c"]
    _report_missing(tmp_path, mask)
    line = "lacks b, c, or has them in another shape: 16 of 40 elements (40.0%) are compared\n"
    assert capsys.readouterr().out.endswith(line)


@pytest.mark.parametrize("name", [NASTY, "x" * 10**4])
def test_a_name_that_cannot_be_printed_is_no_parameter(name: str) -> None:
    bits: Sequence[bool] = [True] * 8
    with pytest.raises(UserError, match="is not a parameter's name"):
        ParamMask(bits={name: pack(torch.tensor(bits))}, shapes={name: (8,)})
