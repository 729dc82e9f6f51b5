"""SGD and Lion on the ticket: kept elements follow the dense rule, the rest is untouched."""

import pytest
import torch

from pmp_ds.optim.masked import MaskedOptimizer
from pmp_ds.optim.masked_rules import MaskedLion, MaskedSGD
from pmp_ds.ticket.mask import pack

NUMEL = 37


def lion_ref(w: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float) -> None:
    m = torch.zeros_like(w)
    for g in gradients:
        w *= 1 - lr * decay
        w -= lr * torch.sign(0.9 * m + 0.1 * g)
        m.mul_(0.99).add_(0.01 * g)


def sgd_ref(w: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float) -> None:
    m = torch.zeros_like(w)
    for g in gradients:
        w *= 1 - lr * decay
        m = 0.9 * m + g
        w -= lr * m


@pytest.mark.parametrize(
    ("kind", "reference"), [(MaskedLion, lion_ref), (MaskedSGD, sgd_ref)], ids=["lion", "sgd"]
)
def test_kept_elements_follow_the_dense_rule(kind, reference):
    generator = torch.Generator().manual_seed(3)
    initial = torch.randn(NUMEL, generator=generator)
    kept = torch.rand(NUMEL, generator=generator) < 0.6
    gradients = [torch.randn(NUMEL, generator=generator) for _ in range(10)]
    weights = initial.clone().requires_grad_()
    optimizer: MaskedOptimizer = kind([weights], lr=0.01, weight_decay=0.1)
    optimizer.arm({weights: pack(kept)})
    for gradient in gradients:
        weights.grad = gradient.masked_fill(~kept, float("nan"))
        optimizer.step()
    expected = initial[kept].clone()
    reference(expected, [gradient[kept] for gradient in gradients], 0.01, 0.1)
    found = weights.detach()
    torch.testing.assert_close(found[kept], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(found[~kept], initial[~kept])
    (moment,) = optimizer.moments
    assert optimizer.state[weights][moment].shape == (int(kept.sum()),)


def test_momentum_by_hand():
    """Three elements, the middle one frozen: w = 1 - 0.5 * 2, then minus 0.5 * (0.9 * 2 + 2)."""
    weights = torch.ones(3, requires_grad=True)
    optimizer = MaskedSGD([weights], lr=0.5, momentum=0.9)
    optimizer.arm({weights: pack(torch.tensor([True, False, True]))})
    for expected in (0.0, -1.9):
        weights.grad = torch.full((3,), 2.0)
        optimizer.step()
        torch.testing.assert_close(weights.detach(), torch.tensor([expected, 1.0, expected]))
