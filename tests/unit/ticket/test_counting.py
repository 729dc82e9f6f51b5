"""The passes of top-k selection in Triton give what those on CPU give: on a GPU where there is one,
and in Triton's interpreter, for which ``test_in_the_interpreter`` runs this file again."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from pmp_ds.errors import UserError
from pmp_ds.ticket import topk
from pmp_ds.ticket.counting import Counting, CpuCounting
from pmp_ds.ticket.mask import popcount

pytest.importorskip("triton")
pytestmark = pytest.mark.processes

REPO = Path(__file__).resolve().parents[3]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_kernels(test):
    """Here if this process interprets, else on a GPU."""
    if INTERPRETED:
        return test
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    return pytest.mark.gpu(missing(test))


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) > 30, result.stdout


def scores(kind: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    if kind == "spread":
        return [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    few = {"tied": (-2, 3), "equal": (1, 2)}[kind]
    return [torch.randint(*few, (n,), generator=generator).to(dtype) for n in sizes]


def select(
    counting: Counting, found: list[torch.Tensor], k: int, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """Fragments whose global order is not the order in which they are given."""
    monkeypatch.setattr(topk, "counting_for", lambda device: counting)
    starts, names = [7000, 0, 3000, 100], list("dacb")
    masks = topk.select_top_k(found, starts, names, k, replicated=True)
    return [mask.cpu() for mask in masks]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["spread", "tied", "equal"])
def test_the_same_masks(monkeypatch, kind, share, dtype):
    from pmp_ds.ticket.counting_cuda import TritonCounting

    sizes = (1025, 7, 2048, 0)
    found = scores(kind, dtype, sizes)
    k = int(share * sum(sizes))
    expected = select(CpuCounting(), found, k, monkeypatch)
    masks = select(TritonCounting(), [s.to(DEVICE) for s in found], k, monkeypatch)
    assert sum(map(popcount, masks)) == k
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))


@runs_kernels
@pytest.mark.parametrize(("dtype", "value"), list(product(DTYPES, [torch.nan, -torch.inf])))
def test_not_finite(monkeypatch, dtype, value):
    from pmp_ds.ticket.counting_cuda import TritonCounting

    found = [s.to(DEVICE) for s in scores("spread", dtype, (1025, 7, 2048, 1))]
    found[2][2000] = value
    with pytest.raises(UserError, match="the gradient of c is not finite"):
        select(TritonCounting(), found, 100, monkeypatch)


@pytest.mark.skipif(INTERPRETED, reason="compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles(monkeypatch, tmp_path, capability):
    """To machine code, without a GPU."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pmp_ds.ticket import counting_cuda as module

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"raw": "*i32", "bits": "*u8", "numel": "i64", "shift": "i32"}
    types |= dict.fromkeys(("counts", "top", "key", "before", "quota"), "*i64")
    constants = {"WITHIN": True, "SIGN": 0x7FFFFFFF, "BLOCK": module.BLOCK}
    for kernel in (module._histogram, module._equals, module._masks):
        own = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        fixed = {name: constants[name] for name, kind in own.items() if kind == "constexpr"}
        made = compile(ASTSource(kernel, own, fixed), target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"]
