"""The share of each kind of parameter in a ticket."""

import torch

from pmp_ds.ticket.densities import by_kind, describe, frozen
from pmp_ds.ticket.mask import ParamMask, pack


def mask(**kept: torch.Tensor) -> ParamMask:
    names = {name.replace("__", "."): bits for name, bits in kept.items()}
    return ParamMask(
        {name: pack(bits.reshape(-1)) for name, bits in names.items()},
        {name: tuple(bits.shape) for name, bits in names.items()},
    )


def some(rows: int, columns: int, count: int) -> torch.Tensor:
    bits = torch.zeros(rows * columns, dtype=torch.bool)
    bits[:count] = True
    return bits.view(rows, columns)


TICKET = mask(
    model__layers__0__q__weight=some(4, 5, 0),
    model__layers__0__norm=torch.ones(3).bool(),
    model__layers__10__q__weight=some(4, 5, 10),
    model__head__weight=some(2, 5, 10),
)


def test_layers_of_a_kind_stand_together():
    assert by_kind(TICKET) == {
        "model.layers.*.q.weight": [(0, 20), (10, 20)],
        "model.layers.*.norm": [(3, 3)],
        "model.head.weight": [(10, 10)],
    }
    assert frozen(TICKET) == ["model.layers.*.q.weight (in 1 of 2)"]


def test_lines():
    lines = describe(TICKET).splitlines()
    assert lines[0].split() == [
        "model.layers.*.q.weight",
        "40",
        "0.250",
        "#####...............",
        "0.000",
        "to",
        "0.500",
    ]
    assert lines[1].split() == ["model.layers.*.norm", "3", "1.000", "#" * 20]
    assert lines[-1].split() == ["all", "53", "0.434"]
