"""The examples of docs/EXTENDING.md, run as they are written, do what their text says."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pmp_ds.audit import report
from pmp_ds.audit.attack import run_attacks
from pmp_ds.cli import parse
from pmp_ds.config import Config
from pmp_ds.config.rules import RULES
from pmp_ds.data.arrow_store import Store
from pmp_ds.finetune.config import FinetuneConfig
from pmp_ds.finetune.method import METHODS
from pmp_ds.finetune.methods import load_model, mask_of
from pmp_ds.glue.read import load
from pmp_ds.glue.tasks import TASKS
from pmp_ds.optim.rules import optimizer_of
from pmp_ds.prepare import inputs, readers
from pmp_ds.ticket.scores import SCORES, Scores
from pmp_ds.ticket.topk import select_top_k
from tests.helpers.commands import call, ok
from tests.helpers.distributed import REPO
from tests.helpers.documents import blocks
from tests.helpers.finetune import write_model
from tests.helpers.workdir import write_corpus
from tests.unit.audit.conftest import Made, make  # noqa: F401  (a fixture)

TEXT = (REPO / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
EXAMPLES = [block.text for block in blocks(TEXT) if block.language == "python"]
TABLES: list[dict[str, Any]] = [SCORES, TASKS, METHODS, RULES, readers.READERS, inputs.SUFFIXES]


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Run all examples in one module, and take their entries out of the tables afterwards."""
    module = ModuleType("pmp_ds_examples")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(report, "ATTACKS", report.ATTACKS)
    before = [dict(table) for table in TABLES]
    for example in EXAMPLES:
        exec(compile(example, "EXTENDING.md", "exec"), module.__dict__)  # noqa: S102
    yield module
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


def test_there_is_one_of_each():
    assert len(EXAMPLES) == TEXT.count("\n## ") - 1  # a command has no code


def test_score():
    scores = Scores(parse(Config, ["--mask.score", "largest"])[0].mask.score)
    for gradient in ([2.0, -5.0, 3.0], [3.0, 0.0, 4.0]):
        ranked = scores.update([torch.tensor(gradient)])
    (bits,) = select_top_k(ranked, [0], ["w"], 1)
    assert int(bits[0]) == 2  # the second element


def test_task(tmp_path: Path):
    (tmp_path / "Parity").mkdir()
    rows = "\n".join(json.dumps({"digits": str(i), "label": i % 2}) for i in range(6))
    for split in ("train", "validation"):
        (tmp_path / "Parity" / f"{split}.jsonl").write_text(rows)
    config = parse(FinetuneConfig, ["--model", "m", "--task", "parity"])[0]
    found = load(TASKS[config.task], tmp_path)
    assert found.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert list(found.validation) == ["Parity"]


def test_method(tmp_path: Path):
    write_model(tmp_path)
    words = ["--model", str(tmp_path / "release"), "--task", "sst2", "--method", "norms"]
    config = parse(FinetuneConfig, words)[0]
    mask, name = mask_of(config, None, load_model(config, 2))
    assert name == "norms"
    assert mask is not None
    kept = {one for one in mask.shapes if mask.full(one).all()}
    assert {one for one in mask.shapes if mask.full(one).any()} == kept
    assert kept == {one for one, shape in mask.shapes.items() if len(shape) == 1} | {"score.weight"}


def test_attack(make: Callable[..., Made]):  # noqa: F811
    (result,) = run_attacks(report.ATTACKS[-1:], make().case())
    assert (result.attack, result.verdict) in (("rows", "open"), ("rows", "chance"))
    assert result.auc is not None


def test_reader(tmp_path: Path):
    write_corpus(tmp_path / "corpus.jsonl", documents=60)
    texts = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").open()]
    (tmp_path / "corpus.lines").write_text("\n".join([*texts, " "]))
    words = ["--train-vocab-size", "300", "--block-size", "16", "--val-fraction", "0.1"]
    words += ["--workers", "1", "--input", "corpus.lines", "--out", "store"]
    ok(call("prepare_data.py", *words, cwd=tmp_path))
    manifest = Store.open(tmp_path / "store").manifest
    counts = [manifest["splits"][split]["documents"] for split in ("train", "validation")]
    assert (sum(counts), manifest["rows"]["empty"]) == (60, 1)


def test_optimizer():
    config = parse(Config, ["--train.optimizer", "sign", "--train.lr", "0.5"])[0]
    weights = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = optimizer_of(config.train, [{"params": [weights], "weight_decay": 0.0}])
    optimizer.arm({weights: torch.tensor([0b101], dtype=torch.uint8)})
    weights.grad = torch.tensor([2.0, 2.0, -3.0])
    optimizer.step()
    assert weights.tolist() == [0.5, 1.0, 1.5]
