"""The benchmarks run and print their figures; what the figures are is no test's business."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FIGURE = re.compile(r"^figure (\w+) \d+\.\d+ goal <= \d+\.\d+ (?:met|short)$", re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "figures"),
    [
        (["benchmarks.optimizer_step", "--without-deepspeed"], [
            "optimizer_step_vs_torch_fused", "optimizer_step_and_zeroing_vs_torch_fused",
            "optimizer_state_vs_torch_fused",
        ]),
        (["benchmarks.topk"], [
            "topk_fp32_vs_kthvalue", "topk_fp32_vs_topk", "topk_fp32_vs_sort",
            "topk_bf16_vs_kthvalue", "topk_bf16_vs_topk", "topk_bf16_vs_sort",
        ]),
    ],
)  # fmt: skip
def test_benchmark_prints_its_figures(command, figures):
    result = subprocess.run(
        [sys.executable, "-m", *command, "--numel", "5000", "--repeats", "1", "--device", "cpu"],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert FIGURE.findall(result.stdout) == figures
    assert re.search("^hardware: .+", result.stdout, re.MULTILINE)
