"""The measurements of a real release by their command, and what they leave in results.jsonl."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmp_ds import results
from pmp_ds.log import read_metrics
from pmp_ds.results import Result
from tests.e2e.conftest import MainRun
from tests.helpers.commands import call, error_of, files_of, ok, run
from tests.helpers.glue import write_glue

pytestmark = pytest.mark.e2e

MODEL = ("--model", "runs/main/release")
TICKET = ("--store", "store", "--ticket", "runs/main/private/ticket")


@pytest.fixture(scope="module")
def texts(work: Path) -> Path:
    """Return the corpus, each document up to its last word."""
    documents = (work / "corpus.jsonl").read_text().splitlines()[:40]
    lines = [json.loads(line)["text"].rstrip(".") for line in documents]
    (work / "words.txt").write_text("\n".join(lines))
    return work / "words.txt"


def by_kind(file: Path) -> dict[str, Result]:
    return {result.kind: result for result in results.read(file)}


def test_all_measures(main_run: MainRun, work: Path, texts: Path, tmp_path: Path):
    file, before = tmp_path / "results.jsonl", files_of(main_run.run.root)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    weights = load_file(main_run.run.release / "model.safetensors")
    half = {
        name: value * (1 + 0.5 * (torch.arange(value.numel()) % 2).view(value.shape))
        for name, value in weights.items()
    }
    save_file(half, tuned / "model.safetensors")
    shutil.copy(main_run.run.release / "config.json", tuned)
    glue = write_glue(tmp_path / "glue", num_train=6, num_validation=6)
    command = (
        "evaluate.py",
        "perplexity",
        "last_word",
        "glue",
        "landscape",
        "gradients",
        *MODEL,
        *TICKET,
        "--text",
        texts,
        "--glue_dir",
        glue,
        "--glue_tasks",
        "sst2",
        "stsb",
        "--alphas",
        "0",
        "0.3",
        "--seeds",
        "4",
        "--blocks",
        "16",
        "--finetuned",
        tuned,
        "--results",
        file,
    )
    done = ok(call(*command, cwd=work))
    assert "they are for its owner's study" in done.stdout
    found = by_kind(file)
    assert list(found) == [
        "perplexity",
        "last_word",
        "zero-shot",
        "untrained-head",
        "landscape",
        "gradients",
    ]
    assert {(r.arm, r.model) for r in found.values()} == {("main", "runs/main/release")}

    loss = found["perplexity"].values["loss"]
    trained = [r["val_loss"] for r in read_metrics(main_run.run.metrics) if "val_loss" in r]
    assert loss == pytest.approx(trained[-1], abs=0.1)  # other blocks, bf16
    assert found["perplexity"].values["perplexity"] == pytest.approx(math.exp(loss))
    assert found["last_word"].values["accuracy"] > 0.2  # of 40 words
    head = found["untrained-head"]
    assert (head.settings["task"], head.settings["seed"]) == ("stsb", 4)
    assert set(head.values["metrics"]["STS-B"]) == {"pearson", "spearman", "accuracy"}
    assert set(head.values["majority"]) == {"STS-B"}

    landscape = found["landscape"].values
    assert landscape["alphas"] == [0.0, 0.3]
    for curves in landscape["directions"].values():
        assert all(curves[scale][0][0] == pytest.approx(loss, abs=1e-6) for scale in curves)
    assert landscape["directions"]["full"]["global"][0][1] > loss + 0.1
    way = dict(zip(landscape["tuned"]["alphas"], landscape["tuned"]["losses"]["full"], strict=True))
    assert way[0.0] == pytest.approx(loss, abs=1e-6)
    assert abs(way[1.0] - loss) > 1e-3
    gradients = found["gradients"].values
    assert gradients["auc"] > 0.6
    assert before == files_of(main_run.run.root)


def test_mistake(work: Path):
    """All others: tests/unit/evaluate/test_command.py."""
    assert "unknown measure 'sizes'" in error_of(run("evaluate.py", "sizes", *MODEL, cwd=work))
