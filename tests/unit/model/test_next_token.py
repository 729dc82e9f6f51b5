"""The loss of each next token: its values, its gradient, and what it copies."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pmp_ds.model.next_token import token_losses


def test_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [5.0, 7.0]]], requires_grad=True)
    losses = token_losses(logits, torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(losses, torch.tensor([[math.log(4 / 3), math.log(2.0)]]))
    losses.sum().backward()
    expected = torch.tensor([[[0.25, -0.25], [-0.5, 0.5], [0.0, 0.0]]])  # nothing follows the last
    torch.testing.assert_close(logits.grad, expected)


class Large(TorchDispatchMode):
    """Notes the operators that allocate as much as the logits have."""

    def __init__(self, numel: int) -> None:
        self.numel, self.names = numel, list[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        given = {one.data_ptr() for one in args if isinstance(one, torch.Tensor)}
        first = result[0] if isinstance(result, tuple) else result
        if first.numel() >= self.numel and first.data_ptr() not in given:
            self.names.append(func.overloadpacket.__name__)
        return result


def test_no_copy_of_the_logits():
    logits = torch.randn(2, 5, 11, requires_grad=True)
    with Large(2 * 4 * 11) as large:
        token_losses(logits, torch.zeros(2, 5, dtype=torch.int64)).sum().backward()
    assert large.names == ["_log_softmax", "nll_loss_backward", "_log_softmax_backward_data"]
