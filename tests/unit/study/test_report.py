"""The report's files: complete, self-contained, readable without pictures."""

import filecmp
import json
import re
from pathlib import Path

import pytest

from pmp_ds.commands.report import main
from pmp_ds.errors import UserError
from pmp_ds.study import model_figures, report
from pmp_ds.study.figures import Picture
from pmp_ds.study.glue_tables import table_one
from pmp_ds.study.page import Section, page
from pmp_ds.study.runs import fine_tunes
from pmp_ds.study.tables import Table
from tests.helpers import study
from tests.unit.study.conftest import save

ORDER = (
    "Verdict",
    "The six numbers",
    "Table 1",
    "Figure 3",
    "Figure 2",
    "Figure 4",
    "Figure 5",
    "Figure 6",
    "Stability of the ticket",
    "Pretraining",
    "The models without",
    "Audit",
    "Canonical metrics",
    "Controls",
    "How the numbers were made",
    "Measurements",
)


def test_parts_in_order(whole: Path):
    text = (whole / "report" / "report.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert len(titles) == len(ORDER)
    assert all(title.startswith(name) for title, name in zip(titles, ORDER, strict=True))
    assert "GLUE: measurable protection." in text
    for roman in ("(i)", "(ii)", "(iii)", "(iv)", "(v)", "(vi)"):
        assert f"| {roman} |" in text
    assert "Not run." not in text
    assert "Several pretraining seeds | not run: one model stands for an arm" in text


def test_markdown_links_exist(whole: Path):
    text = (whole / "report" / "report.md").read_text()
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", text)
    assert len(pictures) == 9
    assert all((whole / "report" / path).stat().st_size > 5000 for _, path in pictures)


def test_html_needs_nothing_beside_it(whole: Path):
    text = (whole / "report" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len(sources) == 9
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)
    assert len(re.findall(r'<img [^>]*alt="[^"]{20,}"', text)) == 9
    assert "color-scheme: light dark" in text
    assert text.count("<table>") == text.count("</table>") == 9


def test_every_table_has_both_files(whole: Path):
    names = {path.name for path in (whole / "report" / "tables").iterdir()}
    tables = (
        "audit",
        "canonical",
        "chosen",
        "columns",
        "controls",
        "headline",
        "methods",
        "models",
        "table1",
    )
    assert names == {f"{name}.{kind}" for name in tables for kind in ("md", "tex")}


def test_same_results_same_bytes(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        model_figures.draw(tmp_path / name, [study.pretrain("pmp", loss=3.0)])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["iou.png", "iou.svg", "pretraining.png", "pretraining.svg"]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[0] == files


def test_missing_parts_say_so(tmp_path: Path):
    long = "pmp-hardened-with-per-tensor-quota-and-half-random-at-density-0.7"
    few = study.study(
        gap=1.0, secret=0.0, tax=0.0, seeds=1, tasks=("sst2",), lrs=(1e-4,), extra_arms=(long,)
    )
    report.write(save(few, tmp_path), [], tmp_path)
    text = (tmp_path / "report.md").read_text()
    for part in (
        "## Figure 5: loss landscape\n\nNot run.",
        "## Figure 6: gradients\n\nNot run.",
        "## Audit\n\nNot run.",
    ):
        assert part in text
    assert long in text


def test_table_one_exact():
    results = [
        study.fine_tune("base", "sst2", "full", score=0.80, seed=0),
        study.fine_tune("base", "sst2", "full", score=0.82, seed=1),
        study.fine_tune("pmp", "sst2", "full", score=0.75, seed=0),
        study.fine_tune("pmp", "sst2", "full", score=0.75, seed=1),
        study.fine_tune("base", "sst2", "full", score=0.60, scratch=True),
    ]
    table = table_one(results, fine_tunes(results))
    assert table.markdown().splitlines()[:6] == [
        "| Stage | Arm | SST-2 |",
        "| --- | --- | --- |",
        "| Majority class | - | 50.90 |",
        "| Full fine-tuning | base | 81.00 ± 12.71 |",
        "| Full fine-tuning | pmp | 75.00 ± 0.00 |",
        "| Full from scratch | - | 60.00* |",
    ]


ODD = "\\_{}#%&$~^`|<b>±](x)\x1b"


def test_table_texts():
    table = Table("t", "A & B, 5%", ("x_1", "y"), [("a|b", "1 ± 2"), ("<c>", "-")])
    assert table.markdown() == (
        "| x_1 | y |\n| --- | --- |\n| a\\|b | 1 ± 2 |\n| \\<c> | - |\n\nA & B, 5%\n"
    )
    assert table.latex().splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\caption{A \& B, 5\%}",
        r"\small",
        r"\label{tab:t}",
        r"\begin{tabular}{ll}",
        r"\hline",
        r"x\_1 & y \\",
        r"\hline",
        r"a|b & 1 $\pm$ 2 \\",
        r"<c> & - \\",
        r"\hline",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_every_text_of_a_results_file_stands_for_itself(tmp_path: Path):
    """In a table's head and body, a paragraph and a caption, in all three formats."""
    table = Table("t", ODD, (ODD, "y"), [(ODD, "-")])
    latex = (
        r"\textbackslash \_\{\}\#\%\&\$\textasciitilde \textasciicircum `|<b>$\pm$](x)"
        r"\textbackslash x1b"
    )
    assert table.latex().splitlines()[7:10:2] == [rf"{latex} & y \\", rf"{latex} & - \\"]
    assert table.markdown().count(r"\\_{}#%&$~^\`\|\<b>±]\(x)\\x1b") == 3
    text = page(ODD, [Section(ODD, [ODD, table, Picture("p", ODD, ODD)])], _pictures(tmp_path))
    written = r"\_{}#%&amp;$~^`|&lt;b&gt;±](x)\x1b"
    assert text.count(written) == 9
    assert "<b>" not in text
    assert "\x1b" not in text


def _pictures(folder: Path) -> Path:
    (folder / "p.png").write_bytes(b"")
    return folder


def test_columns_of_one_name_are_both_there():
    """A stranger's column that is called like one of the table's own."""
    table = Table("t", "", ("Arm", "Arm"), [("a", "b")])
    assert r"Arm & Arm \\" in table.latex()
    assert r"a & b \\" in table.latex()


@pytest.mark.parametrize(
    ("content", "audit", "message"),
    [
        (None, None, "results.jsonl is missing"),
        ("", None, "results.jsonl is empty"),
        ("{]\n", None, "line 1 is damaged"),
        ('{"kind": "finetune"}\n', None, "line 1 is damaged"),
        ("whole", "missing.json", "missing.json is missing: pmp-ds audit"),
        ("whole", "results.jsonl", "results.jsonl is damaged"),
        ("whole", "other.json", "other.json is no audit.json"),
    ],
)
def test_bad_input(tmp_path: Path, content: str | None, audit: str | None, message: str):
    if content == "whole":
        save(study.study(gap=0, secret=0, tax=0, seeds=2, tasks=("lm",), lrs=(1e-4,)), tmp_path)
    elif content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    argv = ["--study", str(tmp_path), *(["--audit", str(tmp_path / audit)] if audit else [])]
    with pytest.raises(UserError, match=re.escape(message)):
        main(argv)
    assert not (tmp_path / "report").exists()


def test_foreign_line_is_named(tmp_path: Path):
    path = save([study.result("finetune", "a", {"task": "sst2"}, {})], tmp_path)
    with pytest.raises(UserError, match=r"kind finetune \(a\): settings is damaged: it lacks meth"):
        report.write(path, [], tmp_path / "report")
