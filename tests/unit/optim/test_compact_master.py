"""The fp32 master for kept elements only: the C++ operator and the torch path give the bits of a
dense fp32 master that is rounded to 16 bits after each update."""

from typing import Any

import pytest
import torch

from pmp_ds.optim.kernels import cpu
from pmp_ds.optim.masked_adamw import MaskedAdamW, adamw_ref, coefficients
from pmp_ds.ticket.mask import pack

GROUP: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(params=["c++", "torch"])
def backend(request, monkeypatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(cpu, "library", lambda: None)
    elif cpu.library() is None:
        pytest.skip("no C++ compiler")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("gradient_dtype", ["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("numel", [1, 15, 1025, 40000])
def test_equals_a_dense_master(numel, density, dtype, gradient_dtype):
    generator = torch.Generator().manual_seed(numel)
    initial = torch.randn(numel, generator=generator).to(dtype)
    kept = torch.rand(numel, generator=generator) < (1.0 if density is None else density)
    weights = initial.clone().requires_grad_()
    optimizer = MaskedAdamW([weights], **GROUP, compact_master=True)
    optimizer.arm({weights: None if density is None else pack(kept)})
    optimizer.gradient_factor = torch.tensor(0.37)
    master = initial[kept].float()
    m, v = torch.zeros_like(master), torch.zeros_like(master)
    for step in range(1, 4):
        gradient = torch.randn(numel, generator=generator).to(dtype)
        gradient[~kept] = float("nan")
        if gradient_dtype == "fp32":
            # torch refuses an fp32 gradient on 16-bit weights, DeepSpeed's offload has them
            full = torch.zeros(numel, requires_grad=True)
            full.grad = gradient.float()
            full.data = weights.data
            optimizer.state[full] = optimizer.state[weights]
            optimizer._masks = {full: next(iter((optimizer._masks or {}).values()))}
            optimizer.param_groups[0]["params"] = [full]
        else:
            weights.grad = gradient
        optimizer.step()
        scaled = gradient[kept].float() * torch.tensor(0.37)
        adamw_ref(master, scaled, m, v, coefficients(GROUP, step))
    found = weights.detach()
    assert torch.equal(optimizer.state[weights]["master"], master)
    assert torch.equal(found[kept], master.to(dtype))
    assert torch.equal(found[~kept], initial[~kept])


def test_rounds_to_nearest_even_and_keeps_nan():
    if cpu.library() is None:
        pytest.skip("no C++ compiler")
    values = torch.tensor([1.0, 1.00390625, 1.01171875, -3e38, float("inf"), float("nan"), 1e-40])
    for dtype in (torch.bfloat16, torch.float16):
        weights = torch.zeros(len(values), dtype=dtype)
        zero = torch.zeros(len(values))
        still = cpu.Coefficients(decay=1.0, eps=1.0, sqrt_correction2=1.0)  # changes nothing
        cpu.masked_adamw_master(
            weights, zero, None, None, zero.clone(), zero.clone(), still, values.clone(), 1.0
        )
        expected = values.to(dtype)
        assert torch.equal(weights.nan_to_num(7.0), expected.nan_to_num(7.0))
