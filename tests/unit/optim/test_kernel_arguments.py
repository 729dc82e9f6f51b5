"""The operators receive addresses, so arguments that do not fit are refused before an address is
taken."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pmp_ds.errors import UserError
from pmp_ds.optim.attach import attach
from pmp_ds.optim.kernels import compiler, cpu
from pmp_ds.optim.kernels.batch import Tensors, kept_before
from pmp_ds.optim.masked_adamw import MaskedAdamW
from pmp_ds.ticket.mask import ParamMask, pack
from tests.helpers.batches import MARGIN, make_ref, work
from tests.helpers.batches import same as unchanged

Change = Callable[[Tensors], dict[str, Any]]


def _operators() -> list[Any]:
    found: list[Any] = [cpu] if compiler.library() is not None else []
    if os.environ.get("TRITON_INTERPRET") == "1":  # by tests/unit/optim/test_triton.py's ways
        from pmp_ds.optim.kernels import cuda

        found.append(cuda)
    return found


def fp64(name: str) -> Change:
    return lambda t: {name: getattr(t, name).double()}


def shorter(name: str) -> Change:
    return lambda t: {name: getattr(t, name)[:-1]}


def with_gaps(name: str) -> Change:
    return lambda t: {name: getattr(t, name).repeat_interleave(2)[::2]}


def elsewhere(name: str) -> Change:
    return lambda t: {name: getattr(t, name).to("meta")}


def moments(*change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda t: {"moments": tuple(f(m) for f, m in zip(change, t.moments, strict=True))}


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:5]


WRONG: dict[str, tuple[str, Change, str]] = {
    "gradient of fp64": (
        "fp32",
        fp64("gradient"),
        "the gradient: dtype float64, needed float32 or",
    ),
    "short gradient": ("fp32", shorter("gradient"), "the gradient: 3950 elements, needed 3951"),
    "gradient with gaps": ("fp32", with_gaps("gradient"), "the gradient: not contiguous"),
    "gradient elsewhere": ("fp32", elsewhere("gradient"), "on meta, needed on cpu"),
    "weights of fp64": ("bf16", fp64("weights"), "the weights: dtype float64"),
    "short weights": ("bf16", shorter("weights"), "the weights: 3950 elements"),
    "weights with gaps": ("bf16", with_gaps("weights"), "the weights: not contiguous"),
    "master of fp64": ("fp32", fp64("master"), "the master: dtype float64, needed float32"),
    "short master": ("fp32", shorter("master"), "the master: 3950 elements, needed 3951"),
    "master elsewhere": ("fp32", elsewhere("master"), "the master: on meta"),
    "short compact master": ("bf16, compact", shorter("master"), r"the master: \d+ elements"),
    "compact master of bf16": (
        "bf16, compact",
        lambda t: {"master": t.master.bfloat16()},
        "the master: dtype bfloat16",
    ),
    "short moments": ("fp32", moments(cut, cut), r"moment 0: 5 elements, needed 3\d\d\d"),
    "unequal moments": ("fp32", moments(same, cut), "moment 1: 5 elements"),
    "moment of fp64": ("fp32", moments(torch.Tensor.double, same), "moment 0: dtype float64"),
    "int64 mask": (
        "fp32",
        lambda t: {"mask": t.mask.long() if t.mask is not None else None},
        "the packed mask: dtype int64",
    ),
    "short mask": ("fp32", shorter("mask"), "does not cover elements 1049 to 5000"),
    "mask elsewhere": ("fp32", elsewhere("mask"), "the packed mask: on meta"),
    "two dtypes of gradients": (
        "fp32",
        lambda t: {"gradient": t.gradient.half() if t.gradient is not None else None},
        "the gradient: several dtypes in one batch",
    ),
    "two dtypes of weights": (
        "bf16",
        lambda t: {"weights": t.weights.half() if t.weights is not None else None},
        "the weights: several dtypes in one batch",
    ),
}


@pytest.mark.parametrize(("kind", "change", "message"), WRONG.values(), ids=WRONG)
def test_batch(kind: str, change: Change, message: str) -> None:
    one = work(kind)
    one.batch()  # as it should be
    fourth = one.tensors[3]  # elements 1049 to 5000 of the first tensor
    one.tensors[3] = fourth.__class__(**vars(fourth) | change(fourth))
    with pytest.raises(ValueError, match=message):
        one.batch()


@pytest.mark.skipif(not _operators(), reason="no C++ compiler")
def test_factor() -> None:
    for operators in _operators():
        one = work("fp32")
        made = one.update(operators)
        for factor in (torch.tensor(1.0).double(), torch.ones(2), torch.ones((), device="meta")):
            with pytest.raises(ValueError, match="the factor: "):
                made.make(factor)


def flip(bits: torch.Tensor, what: str) -> None:
    if what == "all ones":
        bits.fill_(255)
    elif what == "all zeros":
        bits.zero_()
    else:
        bits[200] ^= 4


@pytest.mark.skipif(not _operators(), reason="no C++ compiler")
@pytest.mark.parametrize("what", ["all ones", "all zeros", "one bit"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16, compact"])
def test_mask_that_changed_in_memory(kind: str, what: str) -> None:
    """After `arm`: there are more or fewer ones than moments. The C++ operators leave such blocks
    alone, the Triton ones update no more elements than there are moments; nothing is written
    outside, and other tensors are updated as always."""
    for operators in _operators():
        ours, expected = work(kind), work(kind)
        for one in (ours, expected):
            one.set_gradients(1)
        before = [t.clone() for t in ours.memory]
        made = ours.update(operators)
        bits = ours.masks[0]
        assert bits is not None
        flip(bits, what)
        squares = made.squares()
        made.make()
        make_ref(expected, None)
        of_tensor = len(ours.memory) - sum(t.gradient is not None for t in ours.tensors)
        of_tensor //= len(ours.masks)
        assert of_tensor == 4  # moments, weights, master
        assert unchanged(ours.memory[of_tensor:], expected.memory[of_tensor:])
        for found, old in zip(ours.memory[:of_tensor], before, strict=False):
            assert torch.equal(found[:MARGIN], old[:MARGIN])
            assert torch.equal(found[-MARGIN:], old[-MARGIN:])
        if operators is cpu and what != "one bit":
            assert unchanged(ours.memory[:of_tensor], before[:of_tensor])
            assert squares[:4].tolist() == [0.0] * 4
        if operators is cpu and what == "one bit":  # in the block of elements 1049 to 2073
            assert not unchanged(ours.memory[:of_tensor], before[:of_tensor])
            changed = ours.memory[3] != expected.memory[3]
            num_kept = int(ours.layout().kept_count[3]) if ours.kind.master == "compact" else 1024
            assert 0 < int(changed.sum()) <= num_kept + 1


def test_places_in_other_bits() -> None:
    with pytest.raises(ValueError, match="the packed mask: dtype int64"):
        kept_before(torch.full((4,), -256), torch.tensor([0]))


def test_arm() -> None:
    weights = torch.nn.Parameter(torch.zeros(15))
    for bits in (torch.full((2,), -256), pack(torch.ones(16).bool()), pack(torch.ones(7).bool())):
        with pytest.raises(UserError, match="a packed mask"):
            MaskedAdamW([weights]).arm({weights: bits})


def _mask(**shapes: tuple[int, ...]) -> ParamMask:
    bits = {n: pack(torch.ones(torch.Size(s).numel()).bool()) for n, s in shapes.items()}
    return ParamMask(bits=bits, shapes=shapes)


MASKS: dict[str, tuple[Callable[[], ParamMask], str]] = {
    "other shape": (
        lambda: _mask(weight=(4, 3), bias=(3,)),
        "'weight' is of shape [3, 4] in the model and of shape [4, 3] in the ticket",
    ),
    "longer": (
        lambda: _mask(weight=(3, 4), bias=(300,)),
        "'bias' is of shape [3] in the model and of shape [300] in the ticket",
    ),
    "one less": (
        lambda: _mask(weight=(3, 4)),
        "'bias' is of shape [3] in the model and missing in the",
    ),
    "one more": (
        lambda: _mask(weight=(3, 4), bias=(3,), x=(1,)),
        "'x' is missing in the model and of shape [1] in the ticket",
    ),
}


@pytest.mark.parametrize(("mask", "message"), MASKS.values(), ids=MASKS)
def test_attach_to_another_model(mask: Callable[[], ParamMask], message: str) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = MaskedAdamW(model.parameters())
    with pytest.raises(UserError, match="the ticket belongs to another model: ") as caught:
        attach(model, optimizer, mask())
    assert message in str(caught.value)
    assert not optimizer.state


def test_attach_names_the_first_few() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    with pytest.raises(UserError, match=r"\(and 6 more\)$"):
        attach(model, MaskedAdamW(model.parameters()), _mask(weight=(2, 2)))


def test_attach_with_the_optimizer_of_another_model() -> None:
    one, other = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    with pytest.raises(UserError, match="holds a parameter that is not trainable"):
        attach(one, MaskedAdamW(other.parameters()), _mask(weight=(3, 4), bias=(3,)))


def test_the_ticket_that_wrote_out_of_bounds(tmp_path: Path) -> None:
    """int64 elements of -256 with the right id, then a step: this used to end the process."""
    from pmp_ds.ticket.ticket import load_ticket
    from tests.helpers.strangers import write_ticket

    shapes = {"weight": (512, 512), "bias": (512,)}
    bits = {n: torch.full((torch.Size(s).numel() // 8,), -256) for n, s in shapes.items()}
    with pytest.raises(UserError, match=r"mask\.safetensors is longer than 37,452 bytes"):
        load_ticket(write_ticket(tmp_path / "t", bits, shapes))
    signed = {name: one.to(torch.int8) for name, one in bits.items()}
    with pytest.raises(UserError, match="the mask of 'weight' is int8 of shape"):
        load_ticket(write_ticket(tmp_path / "s", signed, shapes))
