"""Two stores with weights, documents apart, on two ranks; then the report, then other mixtures."""

import json
import re
import shutil
from pathlib import Path

import pytest

from pmp_ds.log import read_metrics
from pmp_ds.run_dir import RunDir
from tests.helpers.commands import DS_CONFIGS, call, error_of, ok
from tests.helpers.forks import command
from tests.helpers.workdir import BLOCK, SHORT, write_corpus

pytestmark = pytest.mark.e2e

COMMAND = (
    "pretrain.py",
    "--config",
    "tiny.yaml",
    "--deepspeed-config",
    DS_CONFIGS / "zero1.json",
    "--run.name",
    "mixed",
    "--data.separate_documents",
    "true",
    *SHORT,
)


@pytest.fixture(scope="module")
def others(work: Path) -> tuple[str, str]:
    """Return two more stores with the first one's tokenizer."""
    for name, documents in (("other_store", 60), ("third_store", 50)):
        write_corpus(work / f"{name}.jsonl", documents, words=30)
        ok(
            call(
                "prepare_data.py",
                "--input",
                f"{name}.jsonl",
                "--tokenizer",
                "store/tokenizer",
                "--block_size",
                str(BLOCK),
                "--val_fraction",
                "0.2",
                "--out",
                name,
                cwd=work,
            )
        )
    return "other_store", "third_store"


def test_mixture(work: Path, others: tuple[str, str]):
    second, third = others
    mixture = f"{{store: 3, {second}: 1}}"
    out = ok(command(*COMMAND, "--data.store", mixture, cwd=work, ranks=2)).stdout
    for name, share in (("store", "75.00%"), (second, "25.00%")):
        assert re.search(rf"^ +{share} {name}: \d+\.\d\d epochs of \d+ blocks$", out, re.MULTILINE)
    record = RunDir(work / "runs" / "mixed")
    losses = [r["val_loss"] for r in read_metrics(record.metrics) if "val_loss" in r]
    assert losses[-1] < losses[0]
    manifest = json.loads((record.checkpoints / "update-00000006" / "manifest.json").read_text())
    assert manifest["dataset_id"] == json.loads(record.data.read_text())["dataset_id"]

    report = ok(call("report.py", "--run", "runs/mixed", cwd=work)).stdout
    found = re.findall(r"(\d+) of 48 samples \(.*?%, asked (.*)%\) from (\w+)", report)
    assert sum(int(count) for count, _, _ in found) == 48
    assert {(share, name) for _, share, name in found} == {("75.00", "store"), ("25.00", second)}

    # Another place or spelling is the same mixture; another mixture is refused.
    shutil.copytree(work / second, work / "moved")
    same = "{moved: 0.25, store: 0.75}"
    assert "already finished" in ok(command(*COMMAND, "--data.store", same, cwd=work)).stdout
    other = f"{{store: 1, {third}: 1}}"
    lines = error_of(call(*COMMAND, "--data.store", other, cwd=work)).splitlines()[1:]
    assert [re.sub("[0-9a-f]{12}", "ID", line) for line in lines] == [
        f"  data.store: {second} (dataset ID), not given",
        f"  data.store: not in the run, {third} (dataset ID)",
        "  data.store, share of store (dataset ID): 0.7500, 0.5000",
    ]
