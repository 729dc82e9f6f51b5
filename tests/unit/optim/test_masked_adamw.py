from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from pmp_ds.optim import update
from pmp_ds.optim.kernels import compiler
from pmp_ds.optim.kernels.batch import Segment
from pmp_ds.optim.masked import parameter_groups
from pmp_ds.optim.masked_adamw import MaskedAdamW
from pmp_ds.ticket.mask import pack, popcount
from tests.helpers.examples import examples

SHAPES = ((7, 9), (50,), (3,), (1,), (16, 8))
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 20
# fp32, 20 updates of size 1e-2: torch's kernel and ours round in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture(params=["c++", 1 << 20, 64, 8], ids="{}".format, autouse=True)
def backend(request, monkeypatch) -> None:
    """Return the C++ operator, and the torch reference in chunks of several sizes."""
    if request.param == "c++":
        if compiler.library() is None:
            pytest.skip("no C++ compiler")
    else:
        monkeypatch.setattr(compiler, "library", lambda: None)
        monkeypatch.setattr(update, "CHUNK", request.param)


def tensors(seed: int = 0, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def masks(density: float, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(shape, generator=generator) < density for shape in shapes]


def gradients(step: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def armed(params: list[torch.Tensor], kept: list[torch.Tensor] | None) -> MaskedAdamW:
    optimizer = MaskedAdamW(params, **HYPER)
    bits = [None] * len(params) if kept is None else [pack(mask) for mask in kept]
    optimizer.arm(dict(zip(params, bits, strict=True)))
    return optimizer


def train(optimizer: torch.optim.Optimizer, params: list[torch.Tensor], steps: int = STEPS) -> None:
    for step in range(1, steps + 1):
        for param, gradient in zip(params, gradients(step), strict=True):
            param.grad = gradient
        optimizer.step()


def test_one_update_by_hand():
    """First update of Adam: every kept element moves by lr against its gradient's sign, after
    decay by 1 - lr * weight_decay = 0.99; the others keep their bits."""
    w = torch.tensor([1.0, 2.0, -3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, -10.0]).requires_grad_()
    kept = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 0, 1]).bool()
    optimizer = MaskedAdamW([w], lr=0.1, weight_decay=0.1, eps=1e-12)
    optimizer.arm({w: pack(kept)})
    w.grad = torch.tensor([2.0, torch.nan, -0.5, torch.inf, 1.0, 1.0, 1.0, 1.0, 1.0, 100.0])
    optimizer.step()
    expected = torch.tensor([0.89, 2.0, -2.87, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, -10.0])
    torch.testing.assert_close(w.detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(optimizer.state[w]["exp_avg"], torch.tensor([0.2, -0.05, 10.0]))


def test_density_1_is_torch_adamw():
    ours, theirs = tensors(), tensors()
    train(armed(ours, None), ours)
    train(torch.optim.AdamW(theirs, fused=True, **HYPER), theirs)
    for a, b, start in zip(ours, theirs, tensors(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
        assert bool((a != start).all())


def test_full_mask_is_no_mask_to_the_bit():
    masked, plain = tensors(), tensors()
    train(armed(masked, masks(1.1)), masked)
    train(armed(plain, None), plain)
    assert all(torch.equal(a, b) for a, b in zip(masked, plain, strict=True))


@pytest.mark.parametrize("density", [0.1, 0.7, 0.99])
def test_kept_elements_are_those_of_dense_adamw_on_them_alone(density):
    """To the bit against our own dense update, because an element's neighbours do not matter;
    within a tolerance against torch's."""
    ours, kept = tensors(), masks(density)
    train(armed(ours, kept), ours)
    alone, torchs = [
        [w.detach()[m].clone().requires_grad_() for w, m in zip(tensors(), kept, strict=True)]
        for _ in range(2)
    ]
    for params, dense in (
        (alone, armed(alone, None)),
        (torchs, torch.optim.AdamW(torchs, **HYPER)),
    ):
        for step in range(1, STEPS + 1):
            for param, mask, gradient in zip(params, kept, gradients(step), strict=True):
                param.grad = gradient[mask]
            dense.step()
    for w, mask, same, close in zip(ours, kept, alone, torchs, strict=True):
        assert torch.equal(w.detach()[mask], same.detach())
        torch.testing.assert_close(w.detach()[mask], close.detach(), **CLOSE)


@pytest.mark.parametrize("poison", [1.0, torch.nan, torch.inf])
def test_the_others_keep_their_bits(poison):
    """They do so whatever their gradient, and in spite of weight decay; a NaN keeps its payload
    too."""
    ours, kept = tensors(), masks(0.5)
    payload = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        ours[0][~kept[0]] = payload
    before = [w.detach().clone() for w in ours]
    optimizer = armed(ours, kept)
    for step in range(1, STEPS + 1):
        for param, mask, gradient in zip(ours, kept, gradients(step), strict=True):
            param.grad = gradient.masked_fill(~mask, poison)
        optimizer.step()
    for w, mask, start in zip(ours, kept, before, strict=True):
        assert torch.equal(w.detach().view(torch.int32)[~mask], start.view(torch.int32)[~mask])
        assert bool((w.detach()[mask] != start[mask]).all())
        assert bool(w.detach()[mask].isfinite().all())


def test_backends_and_chunks_change_nothing(monkeypatch):
    here, reference = tensors(), tensors()
    train(armed(here, masks(0.7)), here)
    monkeypatch.setattr(compiler, "library", lambda: None)
    monkeypatch.setattr(update, "CHUNK", 1 << 20)
    train(armed(reference, masks(0.7)), reference)
    assert all(torch.equal(a, b) for a, b in zip(here, reference, strict=True))


def test_state_is_compact():
    params, kept = tensors(), masks(0.7)
    optimizer = armed(params, kept)
    train(optimizer, params, 2)
    for param, mask in zip(params, kept, strict=True):
        state = optimizer.state[param]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (int(mask.sum()),)
        assert float(state["step"]) == 2.0
    num_kept = sum(int(mask.sum()) for mask in kept)
    num_bytes = sum((mask.numel() + 7) // 8 for mask in kept)
    assert optimizer.state_bytes == 8 * num_kept + num_bytes


def test_state_bytes_without_a_mask():
    params = tensors()
    assert armed(params, None).state_bytes == 8 * sum(p.numel() for p in params)


def test_nothing_happens_before_arm():
    """DeepSpeed steps once with zero gradients inside `initialize`: weight decay must not act."""
    params = tensors()
    optimizer = MaskedAdamW(params, **HYPER)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, tensors(), strict=True))
    assert not optimizer.state


def test_closure_is_called_before_and_after_arm():
    params = tensors()
    optimizer = MaskedAdamW(params)
    assert optimizer.step(lambda: 3.5) == 3.5
    optimizer.arm(dict.fromkeys(params))
    assert optimizer.step(lambda: 2.5) == 2.5


def test_tensor_without_gradient_is_left_alone():
    params = tensors()
    optimizer = armed(params, masks(0.7))
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(params, tensors(), strict=True)]
    assert moved == [False, True, False, False, False]
    assert [float(optimizer.state[p]["step"]) for p in params] == [0, 1, 0, 0, 0]


def test_arming_again_starts_afresh():
    params, again = tensors(), tensors()
    optimizer = armed(params, masks(0.3))
    train(optimizer, params, 5)
    with torch.no_grad():
        for param, start in zip(params, tensors(), strict=True):
            param.copy_(start)
    optimizer.arm({p: pack(m) for p, m in zip(params, masks(0.7), strict=True)})
    train(optimizer, params, 5)
    train(armed(again, masks(0.7)), again, 5)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_groups_one_at_a_time_in_any_order(order):
    """ZeRO passes one parameter group, or a sub-group in a group of its own, and leaves the
    others out or empty. State is stored by tensor, never by a group's number."""
    together, apart = tensors(), tensors()
    decays = [0.1, 0.0, 0.3]
    split = [slice(0, 2), slice(2, 3), slice(3, 5)]

    def groups(params):
        pairs = zip(split, decays, strict=True)
        return [{"params": params[part], "weight_decay": decay} for part, decay in pairs]

    a = MaskedAdamW(groups(together), lr=1e-2)
    b = MaskedAdamW(groups(apart), lr=1e-2)
    for optimizer, params in ((a, together), (b, apart)):
        optimizer.arm({p: pack(m) for p, m in zip(params, masks(0.7), strict=True)})
    everything = list(b.param_groups)
    empty = [{**group, "params": []} for group in everything]
    for step in range(1, 6):
        for params in (together, apart):
            for param, gradient in zip(params, gradients(step), strict=True):
                param.grad = gradient
        a.step()
        for index in order:
            if step % 2:  # stages 1 and 2: the group alone
                b.param_groups = [everything[index]]
            else:  # stage 3: the others are there, empty
                b.param_groups = [everything[i] if i == index else empty[i] for i in range(3)]
            b.step()
    assert all(torch.equal(x, y) for x, y in zip(together, apart, strict=True))


def test_one_step_tensor_shared_by_all():
    """DeepSpeed's stage 3 lets sub-groups share one: counting in place would count once per
    tensor."""
    params, plain = tensors(), tensors()
    optimizer = armed(params, masks(0.7))
    shared = torch.zeros(())
    for state in optimizer.state.values():
        state["step"] = shared
    train(optimizer, params, 3)
    train(armed(plain, masks(0.7)), plain, 3)
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))


def test_empty_mask_moves_nothing():
    params = tensors()
    optimizer = armed(params, masks(0.0))
    train(optimizer, params, 3)
    assert all(torch.equal(a, b) for a, b in zip(params, tensors(), strict=True))
    assert all(optimizer.state[p]["exp_avg"].shape == (0,) for p in params)


def test_learning_rate_of_the_moment():
    """A scheduler writes group["lr"] before each step."""
    params = tensors()
    optimizer = armed(params, masks(0.7))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(optimizer, params, 3)
    assert all(torch.equal(a, b) for a, b in zip(params, tensors(), strict=True))


@examples(30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 40), st.data())
def test_any_mask_of_any_size(numel, data):
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=numel, max_size=numel))).bool()
    (w,), (start,) = tensors(1, [(numel,)]), tensors(1, [(numel,)])
    w_alone = start.detach()[kept].clone().requires_grad_()
    optimizer, dense = armed([w], [kept]), torch.optim.AdamW([w_alone], **HYPER)
    for step in range(1, 4):
        (w.grad,) = gradients(step, [(numel,)])
        w_alone.grad = w.grad[kept]
        optimizer.step()
        dense.step()
    torch.testing.assert_close(w.detach()[kept], w_alone.detach(), **CLOSE)
    assert torch.equal(w.detach()[~kept], start.detach()[~kept])


SEGMENTS = (Segment(0, 0, 6), Segment(0, 8, 3), Segment(1, 0, 4))
"""Two flats of 11 and 4 elements: two elements of the first are padding, of no fragment."""


def flats() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two flats, and gradients of SEGMENTS: NaN in the complement and in the padding."""
    (a,), (b,) = tensors(3, [(11,)]), tensors(4, [(4,)])
    whole = [torch.full((11,), torch.nan), torch.full((4,), torch.nan)]
    whole[0][[1, 5, 10]] = torch.tensor([1.0, 2.0, 4.0])
    whole[1][[0, 3]] = torch.tensor([8.0, -16.0])
    return [a, b], [whole[s.tensor][s.start : s.start + s.numel] for s in SEGMENTS]


def kept_of_flats() -> list[torch.Tensor]:
    a = torch.tensor([0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1]).bool()
    return [a, torch.tensor([1, 0, 0, 1]).bool()]


def test_segments_of_flats():
    """As ZeRO has them: the complement, whose gradients are NaN, enters neither norm nor update;
    padding and complement keep their bits; the rest moves as plain tensors do."""
    ours, gradient = flats()
    kept = kept_of_flats()
    optimizer = MaskedAdamW(ours, **HYPER)
    optimizer.arm({w: pack(m) for w, m in zip(ours, kept, strict=True)}, SEGMENTS)
    made = optimizer.update(gradient)
    assert made.squares().tolist() == [5.0, 16.0, 320.0]
    made.make(torch.tensor(0.5))
    start, _ = flats()
    for w, m, before, numbers in zip(
        ours, kept, start, ([1.0, 2.0, 4.0], [8.0, -16.0]), strict=True
    ):
        alone = before.detach()[m].clone().requires_grad_()
        plain = armed([alone], None)
        alone.grad = torch.tensor(numbers) * 0.5
        plain.step()
        assert torch.equal(w.detach()[m], alone.detach())
        assert torch.equal(w.detach()[~m], before.detach()[~m])
        for name in optimizer.moments:
            assert torch.equal(optimizer.state[w][name], plain.state[alone][name])


def test_segments_without_a_mask():
    """Padding is trained by nobody, although its moments have a place."""
    ours, _ = flats()
    optimizer = MaskedAdamW(ours, **HYPER)
    optimizer.arm(dict.fromkeys(ours), SEGMENTS)
    ones = [torch.ones(s.numel) for s in SEGMENTS]
    made = optimizer.update(ones)
    assert made.squares().tolist() == [6.0, 3.0, 4.0]
    made.make()
    start, _ = flats()
    moved = [(w != before).tolist() for w, before in zip(ours, start, strict=True)]
    assert moved == [[True] * 6 + [False] * 2 + [True] * 3, [True] * 4]
    assert [bool(x) for x in optimizer.state[ours[0]]["exp_avg"]] == moved[0]


def test_weights_of_the_model_are_the_rounded_master():
    """The places of the complement keep what the model has there."""
    ours, gradient = flats()
    kept = kept_of_flats()
    model = [torch.full((s.numel,), 3.0, dtype=torch.bfloat16) for s in SEGMENTS]
    optimizer = MaskedAdamW(ours, **HYPER)
    optimizer.arm({w: pack(m) for w, m in zip(ours, kept, strict=True)}, SEGMENTS)
    optimizer.update(gradient, model).make()
    for s, half in zip(SEGMENTS, model, strict=True):
        part = slice(s.start, s.start + s.numel)
        expected = torch.full((s.numel,), 3.0, dtype=torch.bfloat16)
        here = kept[s.tensor][part]
        expected[here] = ours[s.tensor].detach()[part][here].bfloat16()
        assert torch.equal(half, expected)


def test_factor_of_nan_changes_nothing_but_is_counted():
    """The host never learns of it."""
    ours, gradient = flats()
    optimizer = MaskedAdamW(ours, **HYPER)
    optimizer.arm({w: pack(m) for w, m in zip(ours, kept_of_flats(), strict=True)}, SEGMENTS)
    optimizer.update(gradient).make(torch.tensor(torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(ours, flats()[0], strict=True))
    assert not any(optimizer.state[w][name].any() for w in ours for name in optimizer.moments)
    assert optimizer.num_updates == 1


def test_groups_of_tensors_that_no_group_lists():
    """ZeRO-3 empties the groups between steps: ``arm`` is told which tensor is of which."""
    decays = [0.0, 0.5]
    optimizers = []
    for listed in (True, False):
        params = tensors(0, [(20,), (30,)])
        groups = [
            {"params": [param], "weight_decay": decay}
            for param, decay in zip(params, decays, strict=True)
        ]
        optimizer = MaskedAdamW(groups, lr=0.1)
        optimizer.arm(dict.fromkeys(params), groups=() if listed else (0, 1))
        if not listed:
            for group in optimizer.param_groups:
                group["params"] = []
        optimizer.update([torch.ones(20), torch.ones(30)]).make()
        optimizers.append((optimizer, params))
    (_, a), (_, b) = optimizers
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    without_decay = [w - 0.1 for w in tensors(0, [(20,), (30,)])]
    torch.testing.assert_close(a[0], without_decay[0])
    assert not torch.allclose(a[1], without_decay[1], atol=1e-3)


def test_parameter_groups_decay_matrices_alone():
    nn = torch.nn
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 4))
    module[2].weight.requires_grad_(False)
    groups = parameter_groups(module.named_parameters(), 0.1)
    names = {id(param): name for name, param in module.named_parameters()}
    assert [(g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups] == [
        (0.1, ["0.weight"]),
        (0.0, ["0.bias", "1.weight", "1.bias", "2.bias"]),
    ]


def test_no_empty_parameter_group():
    """DeepSpeed fails on one."""
    groups = parameter_groups(torch.nn.Linear(3, 2, bias=False).named_parameters(), 0.1)
    assert len(groups) == 1
    assert parameter_groups([], 0.1) == []


def test_popcount_agrees_with_the_state():
    (w,), (mask,) = tensors(0, [(13, 11)]), masks(0.4, [(13, 11)])
    assert armed([w], [mask]).state[w]["exp_avg"].numel() == popcount(pack(mask))
