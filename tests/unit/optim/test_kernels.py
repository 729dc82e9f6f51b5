"""The choice of operators for a tensor, and the C++ ones by themselves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pmp_ds.optim import kernels
from pmp_ds.optim.kernels import cpu, kernels_for
from pmp_ds.optim.masked import zero_complement_ref
from pmp_ds.ticket.mask import pack

REPO = Path(__file__).resolve().parents[3]
needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")


def test_block_prefix_by_hand():
    """Ten bytes in blocks of two: the kept elements before each."""
    bits = torch.tensor([1, 0, 255, 1, 0, 0, 128, 3, 7, 0], dtype=torch.uint8)
    assert cpu.kept_before_blocks(bits, 16).tolist() == [0, 1, 10, 10, 13]
    assert cpu.kept_before_blocks(bits[:3], 16).tolist() == [0, 1]
    assert cpu.kept_before_blocks(bits[:0], 16).tolist() == []


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0, 1, 7, 8, 1021])
@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 32, 1000, 40000])
def test_zero_complement_is_the_reference(numel, start, dtype):
    """A fragment begins at any bit of its flat's mask, and ends with it; neighbours in memory
    are unchanged. 40,000 are several blocks for the threads."""
    generator = torch.Generator().manual_seed(start + numel)
    bits = pack(torch.rand(start + numel, generator=generator) < 0.7)
    memory = torch.randn(numel + 2, generator=generator).to(dtype)
    memory[::3], memory[1::7], memory[2::11] = torch.nan, torch.inf, -0.0
    reference = memory.clone()
    cpu.zero_complement(memory[1:-1], bits, start)
    zero_complement_ref(reference[1:-1], bits, start)
    raw = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(memory.view(raw), reference.view(raw))


@needs_compiler
def test_serves_fp32_on_cpu():
    assert kernels_for(torch.zeros(1)) is cpu


def test_serves_nothing_else():
    assert kernels_for(torch.zeros(1, dtype=torch.float64)) is None
    assert kernels_for(torch.zeros(1, device="meta")) is None


def test_without_triton_a_warning_and_the_reference(monkeypatch):
    """The warning is given once, not for every tensor."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pmp_ds.optim.kernels.cuda", raising=False)
    monkeypatch.delattr(kernels, "cuda", raising=False)
    kernels._triton_kernels.cache_clear()
    with pytest.warns(UserWarning, match="pip install triton"):
        assert kernels._triton_kernels() is None
    assert kernels._triton_kernels() is None
    kernels._triton_kernels.cache_clear()


@pytest.mark.processes
def test_imports_without_triton():
    program = "import sys; sys.modules['triton'] = None; import pmp_ds.optim.masked_adamw"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
