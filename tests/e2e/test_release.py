"""The release: loads where pmp_ds does not exist, equals the run's weights, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pmp_ds.run_dir import RunDir
from tests.e2e.conftest import MainRun
from tests.e2e.test_main_job import final_weights, initial_weights
from tests.helpers.commands import RECIPES, error_of, files_of, ok, run
from tests.helpers.workplace import SHORT, STEPS

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
    """What a fresh interpreter without pmp_ds sees of a release."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(folder), text],
        check=False, capture_output=True, text=True, timeout=120, cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def logits_of_run(run: RunDir, step: int, ids: list[list[int]]) -> torch.Tensor:
    """Of the checkpoint's plain weights, rounded to bf16 as the release is."""
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
    assert "kana " in main_run.export.stdout.splitlines()[-1]


def test_initial_weights_go_to_a_private_folder_alone(main_run: MainRun, work: Path):
    export = ("export.py", "--run", "runs/main", "--checkpoint", "init")
    before = files_of(main_run.run.root)
    assert "--checkpoint init needs --out" in error_of(run(*export, cwd=work))
    for inside in ("runs/main/release", "runs/main/release/init"):
        message = error_of(run(*export, "--out", inside, cwd=work))
        assert "initial weights there would show the mask" in message
    assert before == files_of(main_run.run.root)

    done = ok(run(*export, "--out", "theta0", cwd=work))
    assert "keep them private" in done.stderr
    assert (work / "theta0").stat().st_mode & 0o777 == 0o700
    stored = load_file(work / "theta0" / "model.safetensors")
    for name, tensor in initial_weights(main_run.run).items():
        assert torch.equal(stored[name], tensor.to(torch.bfloat16))


def test_a_release_is_never_overwritten(main_run: MainRun, work: Path):
    before = files_of(main_run.run.root)
    message = error_of(run("export.py", "--run", "runs/main", cwd=work))
    assert "runs/main/release exists already" in message
    assert before == files_of(main_run.run.root)


def test_a_public_seed_is_refused(work: Path):
    """Paper mode, through the random-mask overlay for speed."""
    done = ok(run(
        "pretrain.py", "--config", "tiny.yaml", "--config", RECIPES / "random-mask.yaml",
        "--run.name", "public", "--init.seed", "42", *SHORT, "--deepspeed-config", "zero1.json",
        cwd=work,
    ))  # fmt: skip
    assert "secrecy    NONE: theta(0) from the public seed" in done.stdout
    refused = error_of(run("export.py", "--run", "runs/public", cwd=work))
    assert "--allow-public-mask" in refused
    assert not (work / "runs/public/release").exists()
    ok(run("export.py", "--run", "runs/public", "--allow-public-mask", cwd=work))
    card = (work / "runs/public/release/README.md").read_text()
    assert "public seed" in card
