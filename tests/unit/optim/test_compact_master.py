"""The fp32 master for kept elements only: the C++ operator and the torch path give the bits of a
dense fp32 master that is rounded to 16 bits after each update."""

from typing import Any

import pytest
import torch

from pmp_ds.optim.kernels import compiler
from pmp_ds.optim.masked_adamw import MaskedAdamW, adamw_ref, coefficients
from pmp_ds.ticket.mask import pack

GROUP: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(params=["c++", "torch"])
def backend(request, monkeypatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(compiler, "library", lambda: None)
    elif compiler.library() is None:
        pytest.skip("no C++ compiler")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("gradient_dtype", ["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("numel", [1, 15, 1025, 40000])
def test_equals_a_dense_master(numel, density, dtype, gradient_dtype):
    """Also with gradients in fp32, as offload has them; torch refuses to hang those on weights."""
    generator = torch.Generator().manual_seed(numel)
    initial = torch.randn(numel, generator=generator).to(dtype)
    kept = torch.rand(numel, generator=generator) < (1.0 if density is None else density)
    weights = initial.clone().requires_grad_()
    optimizer = MaskedAdamW([weights], **GROUP, master="compact")
    optimizer.arm({weights: None if density is None else pack(kept)})
    master = initial[kept].float()
    m, v = torch.zeros_like(master), torch.zeros_like(master)
    for step in range(1, 4):
        gradient = torch.randn(numel, generator=generator)
        gradient = gradient.to(dtype) if gradient_dtype == "same" else gradient
        gradient[~kept] = float("nan")
        factor = torch.tensor(1.0 if step == 3 else 0.37)
        if step == 3 and gradient_dtype == "same":
            weights.grad = gradient
            optimizer.step()
        else:
            optimizer.update([gradient]).make(factor)
        adamw_ref(master, gradient[kept].float() * factor, m, v, coefficients(GROUP, step))
    found = weights.detach()
    assert torch.equal(optimizer.state[weights]["master"], master)
    assert torch.equal(found[kept], master.to(dtype))
    assert torch.equal(found[~kept], initial[~kept])
