"""SGD and Lion on the ticket: kept elements follow the dense rule, the rest is untouched."""

import pytest
import torch

from pmp_ds.config import TrainConfig
from pmp_ds.optim.masked import MaskedOptimizer
from pmp_ds.optim.masked_adamw import MaskedAdamW
from pmp_ds.optim.masked_rules import MaskedLion, MaskedSGD
from pmp_ds.optim.rules import optimizer_of, rule_of
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


@pytest.mark.parametrize(
    ("name", "given", "kind", "expected"),
    [
        ("adamw", None, MaskedAdamW, {"betas": (0.9, 0.999), "eps": 1e-6}),
        ("adamw", (0.8, 0.95), MaskedAdamW, {"betas": (0.8, 0.95), "eps": 1e-6}),
        ("lion", None, MaskedLion, {"betas": (0.9, 0.99)}),
        ("sgd", None, MaskedSGD, {"momentum": 0.9}),
        ("sgd", (0.5, 0.0), MaskedSGD, {"momentum": 0.5}),
    ],
)
def test_settings_of_a_run(name, given, kind, expected):
    """``train.optimizer`` and the settings it takes from a run."""
    config = TrainConfig(optimizer=name, betas=given, eps=1e-6, lr=0.25)
    optimizer = optimizer_of(config, [{"params": [torch.ones(3)], "weight_decay": 0.5}])
    assert type(optimizer) is kind is rule_of(config)
    (group,) = optimizer.param_groups
    assert {k: v for k, v in group.items() if k in ("betas", "eps", "momentum")} == expected
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_compact_master_is_the_fp32_one(name):
    """16-bit weights with a compact master learn the same as fp32 weights, and equal them,
    rounded."""
    generator = torch.Generator().manual_seed(5)
    initial = torch.randn(NUMEL, generator=generator).bfloat16()
    kept = torch.rand(NUMEL, generator=generator) < 0.6
    half, full = initial.clone(), initial.float()
    config = TrainConfig(optimizer=name, lr=0.01)
    both = [
        optimizer_of(config, [{"params": [half]}], master="compact"),
        optimizer_of(config, [{"params": [full]}]),
    ]
    for optimizer, weights in zip(both, (half, full), strict=True):
        optimizer.arm({weights: pack(kept)})
    for _ in range(5):
        gradient = torch.randn(NUMEL, generator=generator).bfloat16()
        half.grad, full.grad = gradient, gradient.float()
        for optimizer in both:
            optimizer.step()
    assert torch.equal(both[0].state[half]["master"], full[kept])
    assert torch.equal(half, full.bfloat16())
