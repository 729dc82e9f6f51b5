"""Which operators serve a tensor, and the C++ ones against a plain loop; Triton's: test_triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pmp_ds.engine.memory import Meter
from pmp_ds.optim import kernels, update
from pmp_ds.optim.kernels import compiler, cpu, kernels_for
from pmp_ds.optim.kernels.batch import BLOCK, Layout, Segment, kept_before
from pmp_ds.ticket.mask import pack
from tests.helpers.batches import (
    KINDS,
    SEGMENTS,
    WITHOUT_GRADIENT,
    make_ref,
    same,
    squares_ref,
    work,
)

REPO = Path(__file__).resolve().parents[3]
needs_compiler = pytest.mark.skipif(compiler.library() is None, reason="no C++ compiler")
BACKENDS = [pytest.param(cpu, id="c++", marks=needs_compiler), pytest.param(None, id="torch")]


def test_kept_before_by_hand():
    """Bytes 1, 0, 255, 1, ... hold one 1, none, eight, one; places on, in and after them."""
    bits = torch.tensor([1, 0, 255, 0b1010, 0, 0, 128, 3, 7, 0], dtype=torch.uint8)
    places = [0, 1, 7, 8, 16, 17, 24, 25, 26, 28, 55, 56, 57, 80]
    expected = [0, 1, 1, 1, 1, 2, 9, 9, 10, 11, 11, 12, 13, 17]
    assert kept_before(bits, torch.tensor(places)).tolist() == expected
    assert kept_before(bits[:0], torch.tensor([0])).tolist() == [0]


def test_kept_before_around_blocks():
    """Every place near the borders of three blocks."""
    dense = torch.rand(2 * BLOCK + 100, generator=torch.Generator().manual_seed(1)) < 0.6
    places = torch.arange(len(dense) + 1)
    places = places[((places + 9) % BLOCK < 18) | (places >= len(dense) - 9)]
    expected = [int(dense[:place].sum()) for place in places]
    assert kept_before(pack(dense), places).tolist() == expected


def test_a_layout_of_many_blocks_takes_little_memory():
    """Less than a byte per element, which a table looked up for all blocks at once would take."""
    numel = 1 << 26
    bits, segments = torch.zeros(numel // 8, dtype=torch.uint8), [Segment(0, 3, numel - 3)]
    with Meter(torch.device("cpu")) as meter:
        peak = meter.peak_of(lambda: Layout(segments, [bits], torch.device("cpu")))
    assert peak < 0.8 * numel


def test_layout_by_hand():
    """Three segments of two tensors: blocks begin where a segment does, not at multiples."""
    dense = torch.zeros(3 * BLOCK, dtype=torch.bool)
    dense[[0, 5, BLOCK + 4, BLOCK + 5, 2 * BLOCK + 7]] = True
    segments = [Segment(0, 5, 2 * BLOCK), Segment(1, 2, BLOCK + 1), Segment(1, 9, 0)]
    layout = Layout(segments, [pack(dense), None], torch.device("cpu"))
    assert layout.segment.tolist() == [0, 0, 1, 1]
    assert layout.first.tolist() == [5, BLOCK + 5, 2, BLOCK + 2]
    assert layout.kept_before.tolist() == [1, 3, 2, BLOCK + 2]
    assert layout.kept_count.tolist() == [2, 1, BLOCK, 1]
    assert layout.needed == {0: 4, 1: BLOCK + 3}
    sums = layout.by_segment(torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64))
    assert sums.tolist() == [3.0, 12.0, 0.0]


@pytest.mark.parametrize("operators", BACKENDS)
def test_no_segments(operators):
    """A rank may own nothing at all."""
    nothing = update.Update(
        work("fp32").update(None)._optimizer,
        [],
        [],
        operators and (operators, Layout([], [], torch.device("cpu"))),
    )
    assert nothing.squares().shape == (0,)
    nothing.make(torch.tensor(1.0))


@pytest.mark.parametrize("operators", BACKENDS)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.7, 1.1])
@pytest.mark.parametrize("kind", KINDS)
def test_step_is_the_reference(kind, density, operators, monkeypatch):
    """To the bit, over several updates, whatever the complement's gradient. The complement and what
    lies around every tensor keep their bits."""
    monkeypatch.setattr(update, "CHUNK", BLOCK if "int8" in kind else 64)
    ours, expected = work(kind, density=density), work(kind, density=density)
    untouched = [t.clone() for t in ours.memory]
    for step, factor in enumerate((None, torch.tensor(0.37), torch.tensor(1e-3)), 1):
        for one in (ours, expected):
            one.set_gradients(step)
        ours.update(operators).make(factor)
        make_ref(expected, factor)
    assert same(ours.memory, expected.memory)
    assert not same(ours.memory, untouched)
    steps = {s.tensor: float(t.state["step"]) for s, t in zip(SEGMENTS, ours.tensors, strict=True)}
    assert steps == {tensor: 0.0 if tensor == WITHOUT_GRADIENT else 3.0 for tensor in steps}


@pytest.mark.parametrize("operators", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_factor_of_nan_changes_nothing(kind, operators):
    one = work(kind)
    one.set_gradients(1)
    one.update(operators).make(torch.tensor(0.5))
    before = [t.clone() for t in one.memory]
    one.update(operators).make(torch.tensor(torch.nan))
    assert same(one.memory, before)


@pytest.mark.parametrize("operators", BACKENDS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16, compact"])
def test_squares_are_the_reference(kind, operators, monkeypatch):
    """In fp64, of kept gradients alone: NaN in the complement does not enter."""
    monkeypatch.setattr(update, "CHUNK", 64)
    one = work(kind)
    one.set_gradients(1, 1e-3 if kind == "fp16, compact" else 1e15)
    found = one.update(operators).squares()
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(squares_ref(one), rel=1e-14)
    first = one.tensors[0].gradient
    assert first is not None
    first[int((~first.isnan()).nonzero()[5])] = torch.inf
    assert one.update(operators).squares()[0] == torch.inf


@needs_compiler
def test_squares_have_the_same_bits_in_torch():
    """Of gradients whose squares add up without rounding, in any order."""
    one = work("bf16")
    one.set_gradients(1)
    for each in one.tensors:
        if each.gradient is not None:
            kept = ~each.gradient.isnan()
            each.gradient[kept] = (each.gradient[kept].clamp(-100, 100) * 8).round() / 8
    assert torch.equal(one.update(cpu).squares(), one.update(None).squares())


@needs_compiler
@pytest.mark.parametrize("kind", ["fp32", "bf16, compact"])
def test_threads_change_nothing(kind):
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            one = work(kind)
            one.set_gradients(1)
            squares = one.update(cpu).squares()
            one.update(cpu).make(torch.tensor(0.37))
            found.append([*one.memory, squares.view(torch.float32)])
    finally:
        torch.set_num_threads(before)
    assert same(*found)


@pytest.mark.parametrize("operators", BACKENDS)
def test_weights_of_some_segments_alone(operators):
    """The others have only the master."""
    ours, expected = work("bf16"), work("bf16")
    for one in (ours, expected):
        one.set_gradients(1)
        one.tensors[3] = one.tensors[3].__class__(**vars(one.tensors[3]) | {"weights": None})
    ours.update(operators).make()
    make_ref(expected, None)
    assert same(ours.memory, expected.memory)


@needs_compiler
def test_gradients_of_two_dtypes_go_by_torch():
    """The operators read one dtype of each kind in a launch."""
    ours, expected = work("bf16"), work("bf16")
    for one in (ours, expected):
        one.set_gradients(1)
        first = one.tensors[0]
        wide = first.gradient.float() if first.gradient is not None else None
        one.tensors[0] = first.__class__(**vars(first) | {"gradient": wide})
    made = ours.update(cpu)
    assert made._operators is None
    made.make()
    make_ref(expected, None)
    assert same(ours.memory, expected.memory)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_nearest_even_and_keeps_nan(dtype):
    """A step that changes nothing: the weights become the rounded master."""
    values = [1.0, 1.00390625, 1.01171875, 1.00048828125, -3e38, torch.inf, torch.nan, 1e-40]
    one = work("fp32 gradients, bf16 weights" if dtype == torch.bfloat16 else "fp16")
    each = one.tensors[-1]
    assert each.weights is not None
    assert each.gradient is not None
    mask = one.masks[5]
    assert mask is not None
    mask.fill_(255)
    each.state["exp_avg"].zero_()
    whole = Layout(SEGMENTS[-1:], one.masks, one.device)
    state = {"exp_avg": torch.zeros(40), "exp_avg_sq": torch.zeros(40), "step": torch.zeros(())}
    each.gradient.zero_()
    each.master[: len(values)] = torch.tensor(values)
    still = each.__class__(
        **vars(each)
        | {
            "moments": (state["exp_avg"], state["exp_avg_sq"]),
            "state": state,
            "group": each.group | {"weight_decay": 0.0},
        }
    )
    update.Update(one.update(None)._optimizer, SEGMENTS[-1:], [still], (cpu, whole)).make()
    expected = each.master.to(dtype)
    assert torch.equal(each.weights.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(each.weights.isnan(), expected.isnan())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_serves_master_weights_on_cpu(dtype):
    """fp32 ones, or with a compact master any weights: ZeRO arms with fp32 flats and then puts
    16-bit weights in their place."""
    tensors = [torch.zeros(1, dtype=dtype), torch.zeros(3, dtype=dtype)]
    assert kernels_for(tensors, master="compact") is cpu
    dense = kernels_for(tensors, master="dense")
    assert dense is (cpu if dtype == torch.float32 else None)


def test_serves_nothing_else():
    one = torch.zeros(1)
    for tensors in ([], [one.double()], [one.to("meta")], [one, one.half()], [one, one.to("meta")]):
        for compact in (False, True):
            assert kernels_for(tensors, master="compact" if compact else "dense") is None


def test_without_triton_a_warning_and_the_reference(monkeypatch):
    """Once, not for every tensor."""
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
