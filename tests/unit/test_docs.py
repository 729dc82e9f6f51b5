"""Commands, files and links in the documentation exist."""

import re
import runpy
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests.helpers.documents import anchors, documents, links

REPO = Path(__file__).resolve().parents[2]

CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
MAKE = re.compile(r"(?<![\w./-])make +([^;&|`\n]+)")
FILE = re.compile(
    r"(?<![\w./-])(?:launcher|ds_configs|docs|benchmarks|tests|pmp_ds|\.ci)/[^\s`'\"();|,]+"
)


def code(text: str) -> str:
    """Return the fenced blocks and `spans` of a markdown text, one after the other."""
    return "\n".join(CODE.findall(text))


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*) *:(?!=)", makefile, re.MULTILINE))


def named_targets(text: str) -> set[str]:
    words = [word for line in MAKE.findall(code(text)) for word in shlex.split(line, comments=True)]
    return {word for word in words if "=" not in word and not word.startswith("-")}


def named_files(text: str) -> set[str]:
    """Return paths spelled out in full: not `recipes/*.yaml`, `zero{0,1}.json` or `NAME`."""
    paths = {path.rstrip(".:") for path in FILE.findall(text)}
    return {path for path in paths if not re.search(r"[*{}<>$]", path)}


def test_readme_teaches_the_main_commands() -> None:
    assert {"demo", "test"} <= named_targets(documents()[0].read_text(encoding="utf-8"))


def test_make_targets_exist() -> None:
    known = make_targets((REPO / "Makefile").read_text(encoding="utf-8"))
    unknown = {
        f"{file.relative_to(REPO)}: make {target}"
        for file in documents()
        for target in named_targets(file.read_text(encoding="utf-8")) - known
    }
    assert unknown == set()


def test_files_exist() -> None:
    missing = {
        f"{file.relative_to(REPO)}: {name}"
        for file in documents()
        for name in named_files(code(file.read_text(encoding="utf-8")))
        if not (REPO / name).exists()
    }
    assert missing == set()


def test_links_lead_somewhere() -> None:
    """To a file, and to a heading in it."""
    broken = set()
    for file in documents():
        text = file.read_text(encoding="utf-8")
        for link in links(text):
            path, _, anchor = link.partition("#")
            target = file.parent / path if path else file
            if not target.exists():
                broken.add(f"{file.relative_to(REPO)}: {link}")
            elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
                broken.add(f"{file.relative_to(REPO)}: {link}: no such heading")
    assert broken == set()


def test_anchors_are_those_of_github() -> None:
    text = "# A `b` & [c](d)\n```\n# no\n```\n## pretrain: run, what?\n"
    assert anchors(text) == {"a-b--c", "pretrain-run-what"}
    assert links("[a](b.md#c) `[d](e)` [f](https://x)\n```\n[g](h)\n```\n") == ["b.md#c"]


def test_files_named_by_the_makefile_exist() -> None:
    named = named_files((REPO / "Makefile").read_text(encoding="utf-8"))
    assert {name for name in named if not (REPO / name).exists()} == set()


@pytest.mark.parametrize(
    ("text", "targets", "files"),
    [
        ("make sure that launcher/none.py", set(), set()),
        ("`make demo`, then `launcher/a.py --out x`", {"demo"}, {"launcher/a.py"}),
        ("```\n$ make lint test && x  # no\n```", {"lint", "test"}, set()),
        ("```\nmake demo TORCH_INDEX=https://x/whl  # no\n```", {"demo"}, set()),
        ("`make -k P=python3.12 PYTEST_ARGS='-k x y' test`", {"test"}, set()),
        (
            "```\ndeepspeed launcher/p.py --config launcher/recipes/x-1.yaml\n```",
            set(),
            {"launcher/p.py", "launcher/recipes/x-1.yaml"},
        ),
        ("`launcher/recipes/*.yaml` `ds_configs/zero{0,1}.json` `x/docs/a.md`", set(), set()),
    ],
)
def test_finders(text: str, targets: set[str], files: set[str]) -> None:
    assert named_targets(text) == targets
    assert named_files(code(text)) == files


def test_make_targets_are_found() -> None:
    assert make_targets("VAR := x\nhelp:\nall: help\n\techo a:\n.PHONY: no\n") == {"help", "all"}


def test_support_table_is_generated() -> None:
    from tests.helpers.matrix import ARCHITECTURES, SUPPORT, table

    found = SUPPORT.read_text().partition(ARCHITECTURES)[0]
    assert found == table(), "run: python -m tests.helpers.matrix"


def test_table_of_architectures_is_whole() -> None:
    """Its text is current, each family has a row, and none failed."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from tests.helpers.families import Row, section
    from tests.helpers.matrix import ARCHITECTURES, SUPPORT

    found = "".join(SUPPORT.read_text().partition(ARCHITECTURES)[1:])
    lines = [line for line in found.splitlines() if line.startswith("| ")][1:]
    rows = [Row(*(cell.strip() for cell in line[1:-1].split("|"))) for line in lines]
    assert found == section(rows), "run: make families"
    assert [row.kind for row in rows] == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert [row.kind for row in rows if "FAILED" in str(row)] == []


def test_configuration_is_generated() -> None:
    from tests.helpers.configuration import DOCUMENT, document

    told = "run: python -m tests.helpers.configuration > docs/CONFIGURATION.md"
    assert DOCUMENT.read_text(encoding="utf-8") == document(), told


def test_drawings_are_up_to_date() -> None:
    from tests.helpers.drawings import DRAWINGS, FOLDER

    assert {path.name for path in FOLDER.iterdir()} == set(DRAWINGS)
    for name, draw in DRAWINGS.items():
        found = (FOLDER / name).read_text(encoding="utf-8")
        assert found == draw(), "run: python -m tests.helpers.drawings"
        ElementTree.fromstring(found)


def test_the_drawing_of_ranks_is_what_a_run_allocates() -> None:
    """Whole on every rank, or a fourth of it, by the model of memory that real engines check."""
    from pmp_ds.config import Config, ModelConfig, TrainConfig
    from pmp_ds.train.budget import Budget
    from tests.helpers.drawings import ROWS, WHOLE_BELOW

    config = Config(model=ModelConfig(), train=TrainConfig(precision="bf16"))
    numel, ranks = 4096, 4
    per_element = {"weights": 2, "gradients": 2, "master weights": 4, "moments": 8, "mask": 1 / 8}
    for stage, whole in WHOLE_BELOW.items():
        json = {"zero_optimization": {"stage": stage}}
        states = Budget({"w": (64, 64)}, numel // 2, config, json, ranks).states()
        for row, ((_, extent), what) in enumerate(zip(ROWS, per_element, strict=True)):
            elements = numel if row < whole else numel // ranks
            elements //= 2 if extent == "ticket" else 1
            assert states[what] == per_element[what] * elements, (stage, what)


def test_every_page_is_in_the_site() -> None:
    """mkdocs itself is strict about it, but runs only in `make docs`."""
    text = (REPO / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r": ([\w/.-]+\.md)$", text, re.MULTILINE)
    pages = {str(file.relative_to(REPO)) for file in documents()} | {"CHANGELOG.md"}
    assert sorted(named) == sorted(pages)


def test_pages_have_the_blank_lines_that_the_site_needs() -> None:
    hook = runpy.run_path(str(REPO / "docs" / "site_hooks.py"))["on_page_markdown"]
    text = "Text:\n- a\n  more\n- b\n\nText\n| c |\n|---|\n```\nx\n- y\n```\n# d\n1. e\n2. f\n"
    apart = text.replace("Text:\n", "Text:\n\n").replace("Text\n|", "Text\n\n|")
    assert hook(text, page=None) == apart
    assert hook(apart) == apart


def test_citation_names_this_version() -> None:
    from pmp_ds import __version__

    found = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == __version__
    assert found["cff-version"] == "1.2.0"
    assert found["references"][0]["identifiers"][0]["value"] == "arXiv:2602.00446"
