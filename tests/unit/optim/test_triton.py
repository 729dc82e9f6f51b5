"""The Triton operators against the torch reference: on a GPU where there is one, and in Triton's
interpreter on CPU. Triton decides between them when it is first imported, so
``test_in_the_interpreter`` runs this file again in a process of its own."""

import importlib
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from pmp_ds.optim import masked
from pmp_ds.optim.kernels import cpu
from pmp_ds.optim.masked import zero_complement_ref
from pmp_ds.optim.masked_adamw import MaskedAdamW, coefficients
from pmp_ds.ticket.mask import pack
from tests.helpers.reference import masked_adamw_ref
from tests.helpers.tiers import daily

pytestmark = pytest.mark.processes

REPO = Path(__file__).resolve().parents[3]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HYPER: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


def runs_kernels(test):
    """Here if this process interprets, else on a GPU."""
    if INTERPRETED:
        return test
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    return pytest.mark.gpu(with_triton(missing(test)))


@pytest.fixture
def triton_kernels():
    return importlib.import_module("pmp_ds.optim.kernels.cuda")


def numbers(numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator).to(DEVICE)


def mask(numel: int, density: float, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(numel, generator=generator) < density).to(DEVICE)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of each number, so that NaN equals NaN and 0 is not -0."""
    return tensor.detach().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(raw(a), raw(b))


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
@pytest.mark.parametrize(
    ("tier", "least"), daily([("not nightly", 15), ("nightly", 50)], [("not nightly", 15)])
)
def test_in_the_interpreter(tier, least):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) > least, result.stdout


@runs_kernels
@pytest.mark.parametrize(
    ("numel", "density"),
    daily(
        product([0, 1, 7, 8, 1023, 1024, 1025, 5000], [None, 0.0, 0.01, 0.7, 1.0]),
        [(0, 0.7), (7, None), (1023, 0.7), (1024, 1.0), (1025, 0.01), (1025, None), (5000, 0.0)],
    ),
)
def test_step_is_the_reference(triton_kernels, numel, density):
    """To the bit, over several updates with a changing rate and a gradient over many magnitudes.
    The complement keeps its bits, a NaN's payload included, whatever its gradient."""
    kept = mask(numel, 2.0 if density is None else density)
    bits = None if density is None else pack(kept)
    prefix = None if bits is None else triton_kernels.block_prefix(bits)
    start = numbers(numel, 1)
    start[~kept] = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32).to(DEVICE)
    num_kept = int(kept.sum())
    ours, reference = (
        [start.clone(), *(torch.zeros(num_kept, device=DEVICE) for _ in range(2))] for _ in range(2)
    )
    for step in range(1, 5):
        gradient = numbers(numel, 1 + step) * 10 ** (8 * numbers(numel, 50 + step))
        gradient[~kept] = torch.nan
        c = coefficients({"lr": 0.01 * step, **HYPER}, step)
        w, m, v = ours
        triton_kernels.masked_adamw(w, gradient, bits, prefix, m, v, c)
        w, m, v = reference
        masked_adamw_ref(w, gradient, bits, m, v, c)
    assert all(same(a, b) for a, b in zip(ours, reference, strict=True))
    assert same(ours[0][~kept], start[~kept])
    assert bool((ours[0] != start)[kept].all())


@runs_kernels
@pytest.mark.parametrize(
    ("numel", "start", "dtype"),
    daily(
        product(
            [0, 1, 1000, 2500], [0, 1, 7, 8, 1021], [torch.float32, torch.bfloat16, torch.float16]
        ),
        [
            *((2500, start, torch.bfloat16) for start in (0, 1, 7, 8, 1021)),
            (0, 1, torch.float32),
            (1, 7, torch.float16),
            (1000, 1021, torch.float32),
        ],
    ),
)
def test_zero_complement_is_the_reference(triton_kernels, numel, start, dtype):
    """A fragment begins at any bit of its flat's mask; neighbours in memory are left alone."""
    bits = pack(mask(start + numel + 5, 0.7))
    memory = numbers(numel + 2, 3).to(dtype)
    memory[::3], memory[1::7], memory[2::11] = torch.nan, torch.inf, -0.0
    reference = memory.clone()
    triton_kernels.zero_complement(memory[1:-1], bits, start)
    zero_complement_ref(reference[1:-1], bits, start)
    assert same(memory, reference)


@runs_kernels
def test_tensors_that_begin_anywhere(triton_kernels):
    """Views that are aligned to four bytes only."""
    kept = mask(3000, 0.7)
    bits, num_kept = pack(kept), int(kept.sum())
    prefix = triton_kernels.block_prefix(bits)
    c = coefficients({"lr": 0.01, **HYPER}, 1)

    def memory() -> list[torch.Tensor]:
        return [numbers(3001, 1), numbers(num_kept + 3, 2), numbers(num_kept + 3, 3).abs()]

    gradient = numbers(3002, 4)[2:]
    ours, reference = memory(), memory()
    w, m, v = ours[0][1:], ours[1][1:-2], ours[2][3:]
    triton_kernels.masked_adamw(w, gradient, bits, prefix, m, v, c)
    w, m, v = reference[0][1:], reference[1][1:-2], reference[2][3:]
    masked_adamw_ref(w, gradient, bits, m, v, c)
    assert all(same(a, b) for a, b in zip(ours, reference, strict=True))


@runs_kernels
def test_optimizer_with_the_operators(triton_kernels, monkeypatch):
    """Several tensors, some without a mask, against the torch operations; no host sync on CUDA."""
    shapes = ((64, 33), (7,), (1500,))

    def train(operators: Any) -> list[torch.Tensor]:
        monkeypatch.setattr(masked, "kernels_for", lambda tensor: operators)
        params = [
            numbers(torch.Size(s).numel(), i).view(s).requires_grad_() for i, s in enumerate(shapes)
        ]
        optimizer = MaskedAdamW(params, lr=0.01, **HYPER)
        bits = [pack(mask(p.numel(), 0.7)) for p in params]
        optimizer.arm(dict(zip(params, [bits[0], None, bits[2]], strict=True)))
        for step in range(1, 6):
            for i, param in enumerate(params):
                param.grad = numbers(param.numel(), 10 * step + i).view(param.shape)
            if operators and not INTERPRETED:
                torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            optimizer.step()
            if not INTERPRETED:
                torch.cuda.set_sync_debug_mode("default")
        state = [optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq")]
        return [*params, *state]

    pairs = zip(train(triton_kernels), train(None), strict=True)
    assert all(same(a, b) for a, b in pairs)


@pytest.mark.gpu
@with_triton
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
def test_gpu_and_cpu_give_the_same_bits(triton_kernels):
    """So a run that moves between devices keeps its state's meaning."""
    kept = mask(5000, 0.7)
    num_kept = int(kept.sum())
    results = []
    for device, operators in (("cuda", triton_kernels), ("cpu", cpu)):
        if operators is cpu and cpu.library() is None:
            pytest.skip("no C++ compiler")
        bits, w, g = (t.to(device) for t in (pack(kept), numbers(5000, 1), numbers(5000, 2)))
        m, v = (torch.zeros(num_kept, device=device) for _ in range(2))
        c = coefficients({"lr": 0.01, **HYPER}, 1)
        operators.masked_adamw(w, g, bits, operators.block_prefix(bits), m, v, c)
        results.append([t.cpu() for t in (w, m, v)])
    assert all(same(a, b) for a, b in zip(*results, strict=True))


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_to_separately_rounded_operations(
    triton_kernels, monkeypatch, tmp_path, capability
):
    """What the interpreter cannot show, without a GPU: the instructions. No contraction, correctly
    rounded division and square root, no flush of subnormals, one element per thread at a time."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = triton_kernels._masked_adamw
    types = dict.fromkeys(kernel.arg_names, "fp32")
    types |= dict.fromkeys(["weights", "gradient", "exp_avg", "exp_avg_sq"], "*fp32")
    types |= {"bits": "*u8", "prefix": "*i64", "numel": "i64", "BLOCK": "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    compiled = compile(
        ASTSource(kernel, types, {"BLOCK": triton_kernels.BLOCK}, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": triton_kernels.WARPS, "enable_fp_fusion": False},
    )
    arithmetic = set(re.findall(r"\b[a-z]+\.[\w.]*\bf32\b", compiled.asm["ptx"]))
    assert {op for op in arithmetic if not op.startswith(("ld", "st", "mov", "selp"))} == {
        "add.rn.f32",
        "mul.rn.f32",
        "div.rn.f32",
        "sqrt.rn.f32",
    }
    per_thread = re.findall(r"sizePerThread = \[(\d+)\]", compiled.asm["ttgir"])
    assert per_thread == ["1"]
