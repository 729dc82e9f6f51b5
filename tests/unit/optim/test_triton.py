"""The Triton operators against a plain loop: on a GPU where there is one, and in Triton's
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

from pmp_ds.config.moments import MOMENTS
from pmp_ds.optim import masked
from pmp_ds.optim.kernels import compiler, cpu
from pmp_ds.optim.kernels.batch import MASTERS, TYPES
from pmp_ds.optim.masked_adamw import MaskedAdamW
from pmp_ds.ticket.mask import pack
from tests.helpers.batches import KINDS, Work, make_ref, same, squares_ref, work
from tests.helpers.tiers import daily

pytestmark = pytest.mark.processes

REPO = Path(__file__).resolve().parents[3]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HYPER: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
DAILY_KINDS = (
    "fp32",
    "fp16",
    "bf16, compact",
    "fp32 gradients, bf16 weights, split",
    "fp32, bf16 moments",
    "bf16, compact, int8 moments",
    "bf16, split, bf16 moments",
)
MOST_REGISTERS = 96  # 64 to 80 with Triton 3.7, so that three programs of 8 warps fit at once

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


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
@pytest.mark.parametrize(
    ("tier", "least"), daily([("not nightly", 15), ("nightly", 15)], [("not nightly", 15)])
)
def test_in_the_interpreter(tier, least):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) >= least, result.stdout


def updated(kind: str, density: float, operators: Any, device: str = DEVICE) -> Work:
    """Three updates of segments that begin anywhere."""
    one = work(kind, device, density=density)
    for step, factor in enumerate((None, torch.tensor(0.37), torch.tensor(1e-3)), 1):
        one.set_gradients(step)
        one.update(operators).make(None if factor is None else factor.to(device))
    return one


@runs_kernels
@pytest.mark.parametrize(
    ("kind", "density"),
    daily(
        product(KINDS, [0.0, 0.01, 0.7, 1.1]),
        [*((kind, 0.7) for kind in DAILY_KINDS), ("bf16, compact", 0.01), ("fp32", 0.0)],
    ),
)
def test_step_is_the_reference(triton_kernels, kind, density):
    """To the bit, over several updates with gradients over many magnitudes. The complement and what
    lies around every tensor keep their bits, whatever the complement's gradient."""
    ours, expected = updated(kind, density, triton_kernels), work(kind, DEVICE, density=density)
    untouched = [t.clone() for t in expected.memory]
    for step, factor in enumerate((None, 0.37, 1e-3), 1):
        expected.set_gradients(step)
        make_ref(expected, None if factor is None else torch.tensor(factor, device=DEVICE))
    assert same(ours.memory, expected.memory)
    assert not same(ours.memory, untouched)


@runs_kernels
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16, compact"])
def test_factor_of_nan_changes_nothing(triton_kernels, kind):
    one = updated(kind, 0.7, triton_kernels)
    before = [t.clone() for t in one.memory]
    one.update(triton_kernels).make(torch.tensor(torch.nan, device=DEVICE))
    assert same(one.memory, before)


@runs_kernels
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16, compact"])
def test_squares_are_the_reference(triton_kernels, kind):
    """In fp64, of kept gradients alone: NaN in the complement does not enter."""
    one = work(kind, DEVICE)
    one.set_gradients(1, 1e-3 if kind == "fp16, compact" else 1e15)
    found = one.update(triton_kernels).squares()
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(squares_ref(one), rel=1e-14)
    assert torch.equal(one.update(triton_kernels).squares(), found)


@runs_kernels
def test_weights_of_some_segments_alone(triton_kernels):
    """The others have only the master."""
    ours, expected = work("bf16", DEVICE), work("bf16", DEVICE)
    for one in (ours, expected):
        one.set_gradients(1)
        one.tensors[3] = one.tensors[3].__class__(**vars(one.tensors[3]) | {"weights": None})
    ours.update(triton_kernels).make()
    make_ref(expected, None)
    assert same(ours.memory, expected.memory)


@runs_kernels
@pytest.mark.parametrize("kind", ["bf16", "bf16, compact"])
def test_flipped_mask_writes_nothing_outside(triton_kernels, kind):
    """A byte of 255 in memory that has gone bad: more ones than the moments were made for."""
    one = work(kind, DEVICE)
    one.set_gradients(1)
    made = one.update(triton_kernels)
    bits = one.masks[0]
    assert bits is not None
    bits[100:130] = 255
    margins = [t[part].clone() for t in one.memory for part in (slice(0, 3), slice(-3, None))]
    made.make()
    after = [t[part] for t in one.memory for part in (slice(0, 3), slice(-3, None))]
    assert same(margins, after)


@runs_kernels
def test_optimizer_with_the_operators(triton_kernels, monkeypatch):
    """Several tensors, some without a mask, against the torch operations; no host sync on CUDA."""
    shapes = ((64, 33), (7,), (1500,))

    def numbers(numel: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(numel, generator=generator).to(DEVICE)

    def train(operators: Any) -> list[torch.Tensor]:
        monkeypatch.setattr(masked, "kernels_for", lambda tensors, master: operators)
        params = [
            numbers(torch.Size(s).numel(), i).view(s).requires_grad_() for i, s in enumerate(shapes)
        ]
        optimizer = MaskedAdamW(params, lr=0.01, **HYPER)
        bits = [pack(numbers(p.numel(), 7) < 0.5) for p in params]
        optimizer.arm(dict(zip(params, [bits[0], None, bits[2]], strict=True)))
        for step in range(1, 6):
            gradients = [numbers(p.numel(), 10 * step + i) for i, p in enumerate(params)]
            if operators and not INTERPRETED:
                torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            made = optimizer.update(gradients)
            squares = made.squares()
            made.make((0.5 / squares.sum().sqrt()).float() if operators else factors[step - 1])
            if not INTERPRETED:
                torch.cuda.set_sync_debug_mode("default")
            factors.append((0.5 / squares.sum().sqrt()).float())
        state = [optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq")]
        return [*params, *state]

    factors: list[torch.Tensor] = []
    ours = train(triton_kernels)
    assert same(ours, train(None))


@pytest.mark.gpu
@with_triton
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_and_cpu_give_the_same_bits(triton_kernels, kind):
    """So a run that moves between devices keeps its state's meaning."""
    if compiler.library() is None:
        pytest.skip("no C++ compiler")
    on_gpu = updated(kind, 0.7, triton_kernels, "cuda")
    assert same(on_gpu.memory, updated(kind, 0.7, cpu, "cpu").memory)


POINTERS = {
    "segment": "*i32",
    "kept_count": "*i32",
    **dict.fromkeys(("first", "kept_before", "begin", "end", "addresses", "places"), "*i64"),
    "coefficients": "*fp32",
    "factor": "*fp32",
    "sums": "*fp64",
}


def compiled(kernel: Any, constants: dict[str, Any], capability: int, warps: int) -> Any:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: POINTERS.get(name, "constexpr") for name in kernel.arg_names}
    types |= {"num_segments": "i32"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    return compile(
        ASTSource(kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )


def registers_and_spills(ptx: str, folder: Path) -> tuple[int, int]:
    """What the assembler that Triton brings says of a program."""
    import triton

    (target,) = re.findall(r"\.target (\w+)", ptx)
    name = "ptxas-blackwell" if target.startswith("sm_10") else "ptxas"
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not ptxas.is_file():
        pytest.skip(f"this triton brings no {name}")
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [str(ptxas), "-v", f"--gpu-name={target}", str(source), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = map(int, re.findall(r"(\d+) bytes spill", said))
    return int(re.findall(r"Used (\d+) registers", said)[0]), sum(spilled)


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="compiles nothing")
@pytest.mark.parametrize(
    ("capability", "kind"),
    daily(
        product([80, 90, 100], [*KINDS, "squares"]),
        [
            (90, "fp32"),
            (80, "bf16"),
            (90, "bf16, compact, int8 moments"),
            (80, "bf16, split, bf16 moments"),
            (100, "bf16"),
            (100, "squares"),
        ],
    ),
)
def test_compiles_to_separately_rounded_operations(
    triton_kernels, monkeypatch, tmp_path, capability, kind
):
    """What the interpreter cannot show, without a GPU: the instructions. No contraction, correctly
    rounded division and square root, no flush of subnormals; one element per thread at a time, as
    several would spread a warp's compact accesses; few registers, none spilled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    constants: dict[str, Any] = {"BLOCK": triton_kernels.BLOCK}
    expected = {"add.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
    if kind == "squares":
        kernel, expected = triton_kernels._sums_of_squares, set()
        constants |= {"GRADIENT": TYPES[torch.bfloat16]}
    else:
        kernel = triton_kernels._masked_adamw
        gradients, weights, master, moments = KINDS[kind]
        constants |= {"GRADIENT": TYPES[gradients], "WEIGHTS": TYPES[weights]}
        constants |= {"MASTER": MASTERS[master], "MOMENTS": MOMENTS[moments].number}
        expected |= {"min.f32"} if moments == "int8" else set()
    found = compiled(kernel, constants, capability, triton_kernels.WARPS)
    ptx = found.asm["ptx"]
    operations = set(re.findall(r"\b[a-z]+\.[\w.]*\bf32\b", ptx))
    moved = ("ld", "st", "mov", "selp", "cvt", "setp", "abs")  # nothing is rounded
    assert {op for op in operations if not op.startswith(moved)} == expected
    assert not re.findall(r"\bfma\.|\.ftz\b|\.approx\b", ptx)
    assert set(re.findall(r"sizePerThread = \[(\d+)\]", found.asm["ttgir"])) == {"1"}
    registers, spilled = registers_and_spills(ptx, tmp_path)
    assert registers <= MOST_REGISTERS
    assert spilled == 0
