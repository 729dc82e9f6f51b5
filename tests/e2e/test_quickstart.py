"""The shell blocks of docs/QUICKSTART.md, run by bash as a reader would, one after the other.

Stand-ins for `pmp-ds` and `python` run the real commands in real processes and add settings that
make them small (``SMALLER``). `tests/unit/test_slurm_script.py` runs the script for SLURM, and
`tests/unit/test_documented.py` parses what the pods of Kubernetes start.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.distributed import REPO
from tests.helpers.documents import blocks
from tests.helpers.glue import write_glue
from tests.helpers.workdir import write_corpus

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(1200)]

TEXT = (REPO / "docs" / "QUICKSTART.md").read_text(encoding="utf-8")
SECTIONS = {
    title: [block.text for block in blocks(part) if block.language == "bash"]
    for title, part in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
}

TINY = """\
run: {val_every: 6, val_blocks: 4, checkpoint_every: 3}
model: {hidden_size: 32, num_layers: 2, num_heads: 4, max_positions: 64}
mask: {iou_threshold: 0.5, patience: 2, max_steps: 30}
train: {steps: 6, warmup_steps: 1, global_batch_size: 4, precision: fp32, lr: 1.0e-3}
"""
SMALLER = {
    "prepare-data": ["--block-size", "32", "--train-vocab-size", "400", "--workers", "1"],
    "pretrain": ["--config", "tiny.yaml"],
    "finetune": ["--train.steps", "2", "--data.max-train", "16"],
    "audit": ["--seconds", "1", "--seeds", "0:1000"],
    "study": ["--plan"],
}
"""Words added to the commands, after those of the document, which they override."""

_STAND_IN = f"""\
#!{sys.executable}
import json, os, sys
words = sys.argv[1:]
command = ["-c", "import sys; from pmp_ds.commands import main; sys.exit(main())"]
start = command if os.path.basename(sys.argv[0]) == "pmp-ds" else []
smaller = json.loads({json.dumps(json.dumps(SMALLER))})
more = next((smaller[word] for word in words if word in smaller), [])
if "--dry-run" in words:
    more = []
if "prepare-data" in words and "--input" not in words:
    more = [*more, "--input", "corpus"]
os.execv({sys.executable!r}, [{sys.executable!r}, *start, *words, *more])
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the page presupposes: text, a tokenizer, GLUE's files."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("corpus", "bin", ".venv/bin", "path/to"):
        (folder / name).mkdir(parents=True)
    write_corpus(folder / "corpus" / "corpus.jsonl")
    write_glue(folder / "glue")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / ".venv/bin/activate").touch()
    (folder / "path/to/tokenizer").symlink_to(folder / "tokenized_data/demo/tokenizer")
    for name, text in (("pmp-ds", _STAND_IN), ("python", _STAND_IN), ("make", "#!/bin/sh\n")):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


def follow(home: Path, title: str) -> str:
    """Run the blocks of a section and return what they wrote."""
    said = []
    for script in SECTIONS[title]:
        done = subprocess.run(
            ["/bin/bash", "-e", "-c", script],
            cwd=home,
            env=os.environ
            | {
                "PATH": os.pathsep.join([str(home / "bin"), os.environ["PATH"]]),
                "PYTHONPATH": str(REPO),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    return "".join(said)


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


@pytest.fixture(scope="module")
def laptop(home: Path) -> str:
    """Return what the first section wrote; the others use its tokenizer and its run."""
    return follow(home, "A laptop, no GPU")


def test_laptop(home: Path, laptop: str):
    assert "(equal)" in laptop
    assert "magnitudes" in laptop  # an attack
    assert (home / "runs/demo/release/model.safetensors").exists()


@pytest.mark.usefixtures("laptop")
def test_one_gpu(home: Path):
    follow(home, "One GPU")
    config = json.loads((home / "runs/gpt2-small/release/config.json").read_text())
    assert config["model_type"] == "gpt2"


@pytest.mark.usefixtures("laptop")
def test_eight_gpus(home: Path):
    assert "80GB" in follow(home, "Eight GPUs on one machine").replace(" ", "").replace(".00", "")
    assert (home / "runs/tinyllama-1.1b/release/SHA256SUMS").exists()


@pytest.mark.usefixtures("laptop")
def test_partner(home: Path):
    assert "fits runs/demo/release" in follow(home, "A partner with a sealed ticket")
    assert (home / "runs/finetune/private/model/config.json").exists()
    (line,) = (home / "runs/finetune/results.jsonl").read_text().splitlines()
    assert json.loads(line)["settings"]["method"] == "ticket"


def test_researcher(home: Path):
    assert "pmp-2" in follow(home, "A researcher with a study")
