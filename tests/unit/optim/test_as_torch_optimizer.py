"""Behaviour of any torch optimizer: schedules, param_groups, state_dict."""

import copy

import pytest
import torch

from pmp_ds.optim.masked import MaskedOptimizer
from pmp_ds.optim.masked_adamw import MaskedAdamW
from pmp_ds.optim.masked_rules import MaskedLion
from pmp_ds.ticket.mask import pack

KEPT = torch.tensor([True, False, True, True, False, True, True])


def armed(dtype: torch.dtype, kind: type[MaskedOptimizer] = MaskedAdamW) -> MaskedOptimizer:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(7, generator=generator).to(dtype).requires_grad_()
    compact = dtype != torch.float32
    optimizer = kind([weights], lr=0.1, master="compact" if compact else "dense")  # type: ignore[call-arg]
    optimizer.arm({weights: pack(KEPT)})
    return optimizer


def update(optimizer: MaskedOptimizer, step: int) -> torch.Tensor:
    (weights,) = optimizer.param_groups[0]["params"]
    generator = torch.Generator().manual_seed(step)
    weights.grad = torch.randn(7, generator=generator).to(weights.dtype)
    optimizer.step()
    return weights.detach().clone()


@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedLion])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_goes_on_to_the_bit(dtype, kind):
    first, second = armed(dtype, kind), armed(dtype, kind)
    for step in range(3):
        weights = update(first, step)
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(saved)
    with torch.no_grad():
        second.param_groups[0]["params"][0].copy_(weights)
    assert second.num_updates == 3
    for step in range(3, 6):
        assert torch.equal(update(first, step), update(second, step))


def test_state_of_another_mask_is_refused():
    other = armed(torch.float32)
    (weights,) = other.param_groups[0]["params"]
    other.arm({weights: pack(~KEPT)})
    with pytest.raises(ValueError, match="another mask"):
        other.load_state_dict(armed(torch.float32).state_dict())


def test_schedule_and_groups():
    """A torch schedule sets the rate that the next update uses; at 0 nothing moves."""
    optimizer = armed(torch.float32)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step % 2))
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    assert torch.equal(update(optimizer, 0), before)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.1
    moved = update(optimizer, 1) != before
    assert torch.equal(moved, KEPT)
