"""The benchmarks run and print their figures; tests do not judge the figures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pmp_ds.prepare.tokenizer import train_tokenizer
from tests.unit.prepare.conftest import make_texts

pytestmark = pytest.mark.processes

REPO = Path(__file__).resolve().parents[2]
FIGURE = re.compile(r"^figure (\w+) \d+\.\d+ goal <= \d+\.\d+ (?:met|short)$", re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "figures"),
    [
        (
            ["benchmarks.optimizer_step", "--without-deepspeed"],
            [
                "optimizer_step_vs_torch_fused",
                "optimizer_phase_vs_torch_passes",
                "optimizer_state_vs_torch_fused",
            ],
        ),
        (
            ["benchmarks.topk"],
            [
                "topk_fp32_vs_kthvalue",
                "topk_fp32_vs_topk",
                "topk_fp32_vs_sort",
                "topk_bf16_vs_kthvalue",
                "topk_bf16_vs_topk",
                "topk_bf16_vs_sort",
            ],
        ),
    ],
)
@pytest.mark.nightly
def test_benchmark_prints_its_figures(command, figures):
    result = subprocess.run(
        [sys.executable, "-m", *command, "--numel", "5000", "--repeats", "1", "--device", "cpu"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert FIGURE.findall(result.stdout) == figures
    assert re.search("^hardware: .+", result.stdout, re.MULTILINE)


AT_LEAST = re.compile(r"^figure (\w+) \d+\.\d+ goal >= \d+(?:\.\d+)? (?:met|short)$", re.MULTILINE)


def run_benchmark(*command: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert re.search("^hardware: .+", result.stdout, re.MULTILINE)
    return result.stdout


@pytest.mark.nightly
def test_reading_benchmark(tmp_path: Path):
    arguments = ("--blocks", "500", "--steps", "10", "--repeats", "1", "--folder", str(tmp_path))
    output = run_benchmark("benchmarks.data_read", *arguments, "--megatron", "/no/such/python")
    assert "--megatron /no/such/python cannot import megatron-core: left out" in output
    found = AT_LEAST.findall(output)
    assert found == ["read_speed_vs_memmap", "read_speed_vs_datasets", "cold_read_speed_vs_memmap"]


@pytest.mark.nightly
def test_preparation_benchmark(tmp_path: Path):
    pytest.importorskip("gigatoken")
    train_tokenizer(make_texts(200), 400).save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in make_texts(3000)))
    output = run_benchmark(
        "benchmarks.data_prepare",
        "--input",
        str(path),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--workers",
        "1",
        "--proof",
        "--peers",
        "nonsense",
        "datasets",
    )
    assert AT_LEAST.findall(output) == ["prepare_speed_vs_reference", "prepare_speed_vs_datasets"]
    assert re.search(r"^prepare_speed_vs_engine \d+\.\d+$", output, re.MULTILINE)
    assert "made the same store as tokenizers" in output
    assert re.search("^nonsense +did not run: ", output, re.MULTILINE)
    output = run_benchmark(
        "benchmarks.data_memory",
        "--input",
        str(path),
        "--gigabytes",
        "0.005",
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--folder",
        str(tmp_path),
    )
    assert FIGURE.findall(output) == ["prepare_peak_gigabytes"]


@pytest.mark.nightly
def test_export_benchmark(tmp_path: Path):
    output = run_benchmark(
        "benchmarks.export",
        "--folder",
        str(tmp_path),
        "--model.num_layers",
        "1",
        "--model.hidden_size",
        "64",
        "--model.intermediate_size",
        "64",
        "--model.num_heads",
        "4",
        "--model.num_kv_heads",
        "4",
    )
    assert FIGURE.findall(output) == ["export_peak_gb", "export_time_vs_copy"]
    assert not list(tmp_path.glob("runs/*"))
