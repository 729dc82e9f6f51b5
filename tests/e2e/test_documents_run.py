"""The shell blocks of the documents, run by bash as a reader would (helpers/reader.py).

`tests/unit/test_documented.py` also parses each of them, in seconds.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.distributed import REPO
from tests.helpers.documents import blocks, documents, shown
from tests.helpers.reader import follow, furnish

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(1200)]

TEXT = (REPO / "docs" / "QUICKSTART.md").read_text(encoding="utf-8")
SECTIONS = {
    title: [block.text for block in blocks(part) if block.language == "bash"]
    for title, part in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
}
PAGES = {
    shown(path): scripts
    for path in documents()
    if (scripts := [b.text for b in blocks(path.read_text("utf-8")) if b.language == "bash"])
}
OTHERWISE = {
    "docs/QUICKSTART.md": "by section, below",
    "CONTRIBUTING.md": "make: tests/unit/test_docs.py",
    "docs/PERFORMANCE.md": "tests/unit/test_benchmarks.py, tiny",
    "tests/pretend/README.md": "tests/pretend",
}
"""Pages that are run by other tests."""
NOT_RUN = ("make ", "#!/bin/bash\n#SBATCH")
"""Beginnings of blocks that are not run here: for the script, tests/ship/test_slurm.py."""
SUBSTITUTES = {"nodes=64": "nodes=2"}


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Follow the first section; return its folder, and what it wrote."""
    folder = tmp_path_factory.mktemp("home")
    furnish(folder)
    return folder, follow(folder, SECTIONS["A laptop, no GPU"])


@pytest.fixture
def home(laptop: tuple[Path, str], tmp_path: Path) -> Path:
    """Return a copy of that folder, with a finished demo, for one test."""
    return shutil.copytree(laptop[0], tmp_path / "home", symlinks=True)


def test_every_section_is_followed_or_named_above():
    elsewhere = {"SLURM", "Kubernetes"}
    assert {title for title, found in SECTIONS.items() if not found} == elsewhere
    assert set(SECTIONS) - elsewhere == {
        "A laptop, no GPU",
        "One GPU",
        "Eight GPUs on one machine",
        "A partner with a sealed ticket",
        "A researcher with a study",
    }


def test_laptop(home: Path, laptop: tuple[Path, str]):
    assert "(equal)" in laptop[1]
    assert "magnitudes" in laptop[1]  # an attack
    assert (home / "runs/demo/release/model.safetensors").exists()


def test_one_gpu(home: Path):
    follow(home, SECTIONS["One GPU"])
    config = json.loads((home / "runs/gpt2-small/release/config.json").read_text())
    assert config["model_type"] == "gpt2"


def test_eight_gpus(home: Path):
    said = follow(home, SECTIONS["Eight GPUs on one machine"])
    assert "80GB" in said.replace(" ", "").replace(".00", "")
    assert (home / "runs/tinyllama-1.1b/release/SHA256SUMS").exists()


def test_partner(home: Path):
    assert "fits runs/demo/release" in follow(home, SECTIONS["A partner with a sealed ticket"])
    assert (home / "runs/finetune/private/model/config.json").exists()
    (line,) = (home / "runs/finetune/results.jsonl").read_text().splitlines()
    assert json.loads(line)["settings"]["method"] == "ticket"


def test_researcher(home: Path):
    assert "pmp-2" in follow(home, SECTIONS["A researcher with a study"])


def finetuned(home: Path) -> None:
    words = "--task lm --data.store tokenized_data/demo --run.name tuned"
    ticket = "--method ticket --ticket runs/demo/private/ticket"
    follow(home, [f"pmp-ds finetune --model runs/demo/release {words} {ticket}"])
    (home / "tuned").symlink_to("runs/tuned/private/model")


def attacker(home: Path) -> None:
    pretrain = "pmp-ds pretrain --config demo --run.name attacker"
    follow(home, [pretrain, "pmp-ds export --run runs/attacker"])


def partner(home: Path) -> None:
    shutil.copytree(home / "runs/demo", home / "runs/x")
    (home / "release").symlink_to("runs/x/release")
    (home / "LEAKED").symlink_to("ticket")
    (home / "FINE_TUNED").symlink_to("runs/finetune/private/model")


def beginner(home: Path) -> None:
    for name in ("runs", "tokenized_data"):
        shutil.rmtree(home / name)


def nothing(home: Path) -> None:
    pass


FOLLOWED: dict[str, tuple[Callable[[Path], None], str]] = {
    "README.md": (nothing, "tokens from"),
    "docs/EVALUATION.md": (nothing, "perplexity"),
    "docs/FINETUNING.md": (nothing, "sst2"),
    "docs/FIRST_RUN.md": (beginner, "(equal)"),
    "docs/OPERATIONS.md": (nothing, "last save"),
    "docs/RELEASE.md": (finetuned, "tuned-release"),
    "docs/SECURITY.md": (attacker, "shadow"),
    "docs/VAULT.md": (partner, "Partner A"),
    "ds_configs/README.md": (nothing, "finished"),
    "tokenized_data/README.md": (nothing, "planned: tokenized_data/big"),
}
"""What a reader of each page has besides a finished demo, and what one of its commands says."""


def test_every_page_is_followed_or_named_above():
    assert set(PAGES) == set(FOLLOWED) | set(OTHERWISE)


@pytest.mark.parametrize("page", FOLLOWED)
def test_page(home: Path, page: str):
    prepare, says = FOLLOWED[page]
    prepare(home)
    scripts = [script for script in PAGES[page] if not script.startswith(NOT_RUN)]
    for old, new in SUBSTITUTES.items():
        scripts = [script.replace(old, new) for script in scripts]
    assert says in follow(home, scripts)
