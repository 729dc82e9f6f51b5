"""The release loads where pmp_ds does not exist and equals the run's weights; other cases are
refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pmp_ds.run_dir import RunDir
from pmp_ds.ticket.ticket import load_ticket
from tests.e2e.conftest import MainRun
from tests.e2e.test_main_job import final_weights, initial_weights
from tests.helpers.commands import RECIPES, call, error_of, files_of, ok
from tests.helpers.faults import seen
from tests.helpers.forks import command
from tests.helpers.workdir import SHORT, STEPS

pytestmark = pytest.mark.e2e

STRANGER = """
import json, sys
sys.modules["pmp_ds"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, text = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(text, return_tensors="pt").input_ids
output = model.generate(ids, max_new_tokens=8, do_sample=False)
print(json.dumps({
    "ids": ids.tolist(), "logits": model(ids).logits.float().tolist(), "dtype": str(model.dtype),
    "text": tokenizer.decode(output[0]), "params": sum(p.numel() for p in model.parameters()),
    "problems": [str(value) for value in info.values() if value],
}))
"""


def load_as_stranger(folder: Path, text: str) -> dict[str, Any]:
    """Return the release as a fresh interpreter without pmp_ds sees it."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(folder), text],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def logits_of_run(run: RunDir, step: int, ids: list[list[int]]) -> torch.Tensor:
    """Return the logits of the checkpoint's plain weights, rounded to bf16 as the release is."""
    weights = run.checkpoints / f"update-{step:08d}" / "weights"
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.inference_mode():
        logits: torch.Tensor = model.to(torch.bfloat16)(torch.tensor(ids)).logits
    return logits.float()


def test_a_stranger_loads_it(main_run: MainRun):
    run = main_run.run
    answer = load_as_stranger(run.release, "kana loto mire")
    assert answer["problems"] == []
    assert answer["dtype"] == "torch.bfloat16"
    assert answer["text"].startswith("kana loto mire")
    assert len(answer["text"]) > len("kana loto mire") + 8
    wanted = logits_of_run(run, STEPS, answer["ids"])
    # The same bf16 operations; matrix kernels may sum in another order.
    torch.testing.assert_close(torch.tensor(answer["logits"]), wanted, atol=0.05, rtol=2**-6)


def test_it_holds_the_last_checkpoint(main_run: MainRun):
    released = load_file(main_run.run.release / "model.safetensors")
    wanted = final_weights(main_run.run)
    assert released.keys() == wanted.keys()
    for name, tensor in released.items():
        assert torch.equal(tensor, wanted[name].to(torch.bfloat16))
    assert "same bytes" in main_run.export.stdout
    assert "the model card names no licence" in main_run.export.stderr
    assert "kana " in main_run.export.stdout.splitlines()[-1]


@pytest.mark.usefixtures("reloaded_here")
def test_initial_weights_go_to_a_private_folder_alone(main_run: MainRun, work: Path):
    export = ("export.py", "--run", "runs/main", "--checkpoint", "init")
    before = files_of(main_run.run.root)
    assert "--checkpoint init needs --out" in error_of(call(*export, cwd=work))
    for inside in ("runs/main/release", "runs/main/release/init"):
        message = error_of(call(*export, "--out", inside, cwd=work))
        assert "initial weights there would show the mask" in message
    assert before == files_of(main_run.run.root)

    done = ok(call(*export, "--out", "theta0", cwd=work))
    assert "keep them private" in done.stderr
    assert "--license" not in done.stderr
    assert (work / "theta0").stat().st_mode & 0o777 == 0o700
    stored = load_file(work / "theta0" / "model.safetensors")
    for name, tensor in initial_weights(main_run.run).items():
        assert torch.equal(stored[name], tensor.to(torch.bfloat16))


def test_a_release_is_never_overwritten(main_run: MainRun, work: Path):
    before = files_of(main_run.run.root)
    message = error_of(call("export.py", "--run", "runs/main", cwd=work))
    assert "runs/main/release already exists" in message
    assert before == files_of(main_run.run.root)


@pytest.mark.usefixtures("reloaded_here")
def test_a_public_seed_is_refused(work: Path):
    """Paper mode, through the random-mask overlay for speed."""
    done = ok(
        command(
            "pretrain.py",
            "--config",
            "tiny.yaml",
            "--config",
            RECIPES / "random-mask.yaml",
            "--run.name",
            "public-random",
            "--init.seed",
            "42",
            *SHORT,
            "--deepspeed-config",
            "zero1.json",
            cwd=work,
        )
    )
    assert "secrecy    NONE: theta(0) from the public seed" in done.stdout
    refused = error_of(call("export.py", "--run", "runs/public-random", cwd=work))
    assert "--allow-public-mask" in refused
    assert not (work / "runs/public-random/release").exists()
    ok(call("export.py", "--run", "runs/public-random", "--allow-public-mask", cwd=work))
    card = (work / "runs/public-random/release/README.md").read_text()
    assert "public seed" in card


def ledger_of(main_run: MainRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in main_run.run.ledger.read_text().splitlines()]


def test_what_left_is_remembered(main_run: MainRun):
    first = ledger_of(main_run)[0]
    assert (first["kind"], first["updates"], first["reason"]) == ("final", STEPS, None)
    assert main_run.run.ledger.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("reloaded_here")
def test_a_second_revision_is_refused(main_run: MainRun, work: Path):
    export = ("export.py", "--run", "runs/main", "--checkpoint", "30", "--out", "second")
    before = ledger_of(main_run)
    message = error_of(call(*export, cwd=work))
    assert "their difference is the mask" in message
    assert f"the final release (update {STEPS})" in message
    assert not (work / "second").exists()
    ok(call(*export, "--private", cwd=work))
    assert (work / "second").stat().st_mode & 0o777 == 0o700
    assert ledger_of(main_run) == before
    shutil.rmtree(work / "second")
    ok(call(*export, "--another-revision", "a study of training", cwd=work))
    assert [entry["reason"] for entry in ledger_of(main_run)[len(before) :]] == [
        "a study of training"
    ]


def test_check_of_a_finished_folder(main_run: MainRun, work: Path):
    done = ok(call("export.py", "--check", "runs/main/release", cwd=work))
    assert "nothing in it but" in done.stdout
    shutil.copytree(main_run.run.release, work / "planted")
    shutil.copy(main_run.run.ledger, work / "planted")
    message = error_of(call("export.py", "--check", "planted", cwd=work))
    assert "ledger.jsonl: not a file of a release" in message
    config = work / "planted/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 7.0}))
    seen("two names", 1, error_of(call("export.py", "--check", "planted", cwd=work)))


def fine_tuned(main_run: MainRun, folder: Path) -> Path:
    """Return the release after large updates of its ticket alone."""
    shutil.copytree(main_run.run.release, folder)
    mask = load_ticket(main_run.run.ticket).mask
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator).mul_(0.02) * mask.full(name)
        tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.usefixtures("reloaded_here")
def test_a_derivative_is_dithered(main_run: MainRun, work: Path):
    fine_tuned(main_run, work / "tuned")
    arguments = (
        "export.py",
        "--derivative",
        "tuned",
        "--base",
        "runs/main/release",
        "--ticket",
        "runs/main/private/ticket",
    )
    done = ok(call(*arguments, "--store", "store", "--out", "tuned-release", cwd=work))
    cost = re.search(r"dither: (\d\.\d+) -> (\d\.\d+) nats per token", done.stdout)
    assert cost is not None
    assert float(cost[1]) != float(cost[2])
    mask = load_ticket(main_run.run.ticket).mask
    base, tuned = (
        load_file(folder / "model.safetensors")
        for folder in (main_run.run.release, work / "tuned-release")
    )
    moved = torch.cat([(base[name] != tuned[name]).flatten() for name in base]).float()
    kept = torch.cat([mask.full(name).flatten() for name in base])
    assert float(moved[kept].mean()) > 0.9
    assert float(moved[~kept].mean()) > 0.9
    entry = ledger_of(main_run)[-1]
    assert (entry["kind"], entry["lineage"]) == ("derivative", ledger_of(main_run)[0]["lineage"])
    assert "fine-tuned from `main`" in (work / "tuned-release/README.md").read_text()
    # A recipient's copy would let the model lose its recipient's marks.
    shutil.copytree(main_run.run.ticket, work / "copy")
    foreign = (*arguments[:-1], "copy", "--out", "other")
    seen("derivative of a copy", 1, error_of(call(*foreign, cwd=work)))
    # A second derivative of the same base would differ from this one as two revisions do.
    tensors = load_file(work / "tuned/model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = torch.where(mask.full(name), tensor + 0.01, tensor)
    save_file(tensors, work / "tuned/model.safetensors", {"format": "pt"})
    message = error_of(call(*arguments, "--out", "third", cwd=work))
    assert "a derivative from the same initial weights was released" in message
    assert list(main_run.run.ticket.glob(".dither*")) == []
