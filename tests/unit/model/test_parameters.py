"""The global element order, worked out by hand."""

import torch
from torch import nn

from pmp_ds.model.parameters import (
    ParamInfo,
    digest,
    num_params,
    parameter_table,
    shapes,
    trained_shapes,
    weights_digest,
)


class Tiny(nn.Module):
    """3 x 2 embedding, frozen 2, norm 2, 2 x 2 linear without bias, head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.frozen = nn.Parameter(torch.rand(2), requires_grad=False)
        self.norm = nn.LayerNorm(2, bias=False)
        self.mix = nn.Linear(2, 2, bias=False)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


def test_table_by_hand() -> None:
    table = parameter_table(Tiny())
    assert table == (
        ParamInfo("embed.weight", (3, 2), 6, 0, False),
        ParamInfo("norm.weight", (2,), 2, 6, True),
        ParamInfo("mix.weight", (2, 2), 4, 8, False),
    )
    assert num_params(table) == 12


def test_shapes_of_a_ticket() -> None:
    with torch.device("meta"):
        model = Tiny()
    expected = {row.name: row.shape for row in parameter_table(Tiny())}
    assert trained_shapes(model) == expected
    assert shapes(model) == {"frozen": (2,)} | expected
    assert list(trained_shapes(model)) == list(expected)


def test_shapes_of_partitioned_parameters() -> None:
    """As DeepSpeed leaves them under ZeRO 3."""
    model = Tiny()
    for param in model.parameters():
        setattr(param, "ds_shape", param.shape)  # noqa: B010
        param.data = torch.empty(0)
    assert trained_shapes(model) == trained_shapes(Tiny())


def test_digest_is_of_names_and_shapes() -> None:
    first, second = Tiny(), Tiny()
    assert digest(parameter_table(first)) == digest(parameter_table(second))
    second.mix = nn.Linear(2, 3, bias=False)
    assert digest(parameter_table(first)) != digest(parameter_table(second))
    second.mix = nn.Linear(2, 2, bias=False)
    second.extra = nn.Linear(1, 1, bias=False)
    assert digest(parameter_table(first)) != digest(parameter_table(second))


def test_weights_digest_sees_one_bit() -> None:
    model = Tiny().to(torch.bfloat16)
    digest_before = weights_digest(model)
    assert weights_digest(model) == digest_before
    with torch.no_grad():
        model.frozen.add_(1.0)
        assert weights_digest(model) == digest_before
        model.mix.weight[1, 1].view(torch.int16).bitwise_xor_(torch.tensor(1, dtype=torch.int16))
    assert weights_digest(model) != digest_before
