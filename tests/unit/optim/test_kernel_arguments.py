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
from pmp_ds.optim.kernels import cpu
from pmp_ds.optim.masked_adamw import MaskedAdamW, coefficients
from pmp_ds.ticket.mask import ParamMask, pack

N = 20_001  # two blocks of the C++ operator, and padding
GROUP = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def _operators() -> list[Any]:
    found: list[Any] = [cpu] if cpu.library() is not None else []
    if os.environ.get("TRITON_INTERPRET") == "1":  # by tests/unit/optim/test_triton.py's ways
        from pmp_ds.optim.kernels import cuda

        found.append(cuda)
    return found


def step(operators: Any, **changes: torch.Tensor | None) -> None:
    kept = torch.arange(N) % 3 == 0
    bits, num_kept = pack(kept), int(kept.sum())
    given: dict[str, Any] = {
        "weights": torch.zeros(N),
        "gradient": torch.zeros(N),
        "bits": bits,
        "prefix": operators.block_prefix(bits),
        "exp_avg": torch.zeros(num_kept),
        "exp_avg_sq": torch.zeros(num_kept),
    }
    operators.masked_adamw(**given | changes, coefficients=coefficients(GROUP, 1.0))


def master_step(operators: Any, **changes: torch.Tensor | None) -> None:
    given: dict[str, Any] = {
        "weights": torch.zeros(N, dtype=torch.bfloat16),
        "gradient": torch.zeros(N),
        "bits": None,
        "prefix": None,
        "exp_avg": torch.zeros(N),
        "exp_avg_sq": torch.zeros(N),
        "master": torch.zeros(N),
    }
    operators.masked_adamw_master(
        **given | changes, coefficients=coefficients(GROUP, 1.0), factor=1.0
    )


WRONG: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "weights of fp64": ({"weights": torch.zeros(N).double()}, "the weights: dtype float64"),
    "short gradient": ({"gradient": torch.zeros(N - 1)}, "the gradient: 20000 elements"),
    "gradient of bf16": ({"gradient": torch.zeros(N).bfloat16()}, "dtype bfloat16, needed float32"),
    "gradient with gaps": ({"gradient": torch.zeros(2 * N)[::2]}, "not contiguous"),
    "gradient elsewhere": ({"gradient": torch.zeros(N, device="meta")}, "on meta, needed on cpu"),
    "int64 bits": ({"bits": torch.full((N // 8 + 1,), -256)}, "the packed mask: dtype int64"),
    "short bits": ({"bits": torch.zeros(8, dtype=torch.uint8)}, "does not cover elements"),
    "long bits": ({"bits": torch.zeros(N, dtype=torch.uint8)}, "has 20001 bytes"),
    "no prefix": ({"prefix": None}, "the packed mask of 20001 elements"),
    "short prefix": ({"prefix": torch.zeros(1).long()}, "the prefix: 1 elements"),
    "prefix of int32": ({"prefix": torch.zeros(2).int()}, "needed int64"),
    "short moment": ({"exp_avg": torch.zeros(5)}, "exp_avg: 5 elements"),
    "unequal moments": ({"exp_avg_sq": torch.zeros(N)}, "exp_avg_sq: 20001 elements"),
    "moment of fp64": ({"exp_avg": torch.zeros(N // 3).double()}, "exp_avg: dtype float64"),
    "more ones than moments": (
        {"bits": torch.full((N // 8 + 1,), 255, dtype=torch.uint8)},
        "exp_avg: 6667 elements",
    ),
}


@pytest.mark.skipif(not _operators(), reason="no C++ compiler")
@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_step(changes: dict[str, torch.Tensor | None], message: str) -> None:
    for operators in _operators():
        step(operators)  # as it should be
        with pytest.raises(ValueError, match=message):
            step(operators, **changes)


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
def test_step_of_a_compact_master() -> None:
    master_step(cpu)
    with pytest.raises(ValueError, match="master: 5 elements"):
        master_step(cpu, master=torch.zeros(5))
    with pytest.raises(ValueError, match="the weights: dtype float32"):
        master_step(cpu, weights=torch.zeros(N))
    with pytest.raises(ValueError, match="the gradient: dtype float16"):
        master_step(cpu, gradient=torch.zeros(N).half())


@pytest.mark.skipif(not _operators(), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("values", "bits", "start"),
    [
        (torch.zeros(9), torch.zeros(1, dtype=torch.uint8), 0),
        (torch.zeros(8), torch.zeros(1, dtype=torch.uint8), 1),
        (torch.zeros(8), torch.zeros(9, dtype=torch.uint8), -8),
        (torch.zeros(8), torch.zeros(8), 0),
        (torch.zeros(8).double(), torch.zeros(1, dtype=torch.uint8), 0),
        (torch.zeros(16)[::2], torch.zeros(2, dtype=torch.uint8), 0),
    ],
)
def test_zero_complement(values: torch.Tensor, bits: torch.Tensor, start: int) -> None:
    for operators in _operators():
        with pytest.raises(ValueError, match=r"the packed mask|the gradient"):
            operators.zero_complement(values, bits, start)


def test_prefix_of_other_bits() -> None:
    with pytest.raises(ValueError, match="the packed mask: dtype int64"):
        cpu.kept_before_blocks(torch.full((4,), -256), 16)


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
