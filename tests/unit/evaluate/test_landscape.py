"""Directions: support, norms, reproducible; walks: the right loss at each step, exact return."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pmp_ds.errors import UserError
from pmp_ds.evaluate.landscape import (
    KINDS,
    SCALES,
    Direction,
    along_tuning,
    landscape,
    num_evaluations,
    place,
    random_direction,
    walk,
)
from pmp_ds.evaluate.perplexity import mean_loss
from pmp_ds.evaluate.subject import Subject, mask_on, read_parameters
from pmp_ds.model.parameters import weights_digest
from pmp_ds.ticket.mask import ParamMask, full_bits, pack
from tests.helpers import tiny

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def read_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def length(delta: Direction) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in delta.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_support_and_norms(subject: Subject, mask: ParamMask, kind: str, scale: str):
    theta = read_of(subject.model)
    delta = random_direction(subject.reader(), mask, kind, scale, 0)
    for name, step in delta.items():
        kept = mask.full(name)
        outside = {"ticket": ~kept, "full": kept & ~kept, "complement": kept}[kind]
        assert not step[outside].any()
        if scale == "global" or kept.all():
            continue
        assert (step[~outside] != 0).all()
        if scale == "per_tensor":
            assert float(step.norm()) == pytest.approx(float(theta[name].norm()), rel=1e-5)
        else:
            torch.testing.assert_close(step.norm(dim=1), theta[name].norm(dim=1))
    if scale == "global":
        assert length(delta) == pytest.approx(length(theta), rel=1e-6)
    else:
        assert not delta[NORM].any()  # wholly kept: nothing to compare it with


def test_rows_of_one_kind_stay(subject: Subject, mask: ParamMask):
    kept = mask.full(EMBED).clone()
    kept[3], kept[4] = True, False
    altered = ParamMask(bits=dict(mask.bits) | {EMBED: pack(kept)}, shapes=mask.shapes)
    for kind in KINDS:
        delta = random_direction(subject.reader(), altered, kind, "per_row", 0)[EMBED]
        assert (delta.abs().sum(dim=1) == 0).nonzero().flatten().tolist() == [3, 4]


def test_the_full_direction_is_the_same_draw(subject: Subject, mask: ParamMask):
    """With one seed the three share z, and another seed is another draw."""
    ticket, full, other = (
        random_direction(subject.reader(), mask, kind, "global", seed)[EMBED]
        for kind, seed in (("ticket", 0), ("full", 0), ("full", 1))
    )
    kept = mask.full(EMBED)
    ratio = ticket[kept] / full[kept]
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
    assert abs(float(torch.corrcoef(torch.stack([full.view(-1), other.view(-1)]))[0, 1])) < 0.05


def test_threads_do_not_matter():
    """Large enough that torch would share its sums among threads."""
    shape = (1024, 300)
    theta = {"w": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    mask, found = ParamMask(bits={"w": pack(kept)}, shapes={"w": shape}), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found += [
                random_direction(theta.__getitem__, mask, "ticket", scale, 5)["w"]
                for scale in SCALES
            ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(found[:3], found[3:], strict=True))


def test_complement_is_untouched_on_the_way(subject: Subject, mask: ParamMask):
    """Bit for bit, negative zeros included."""
    with torch.no_grad():
        subject.model.get_parameter(EMBED)[:, ::2] *= 0.0
        subject.model.get_parameter(EMBED)[:, ::2] *= -1.0
    theta = read_of(subject.model)
    for scale in SCALES:
        delta = random_direction(theta.__getitem__, mask, "ticket", scale, 0)
        for alpha in (-0.5, 0.5):
            place(subject.model, theta.__getitem__, delta, alpha)
            for name, param in subject.model.named_parameters():
                kept, here = mask.full(name), param.detach().view(torch.int32)
                before = theta[name].view(torch.int32)
                assert torch.equal(here[~kept], before[~kept])
                assert kept.all() or not torch.equal(here[kept], before[kept])


class Bowl(nn.Module):
    """Loss = sum of c * w^2, so every direction's curve is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 3))
        self.c = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    def loss(self) -> float:
        return float((self.c * self.w.detach().square()).sum())


def test_walk_in_a_bowl():
    bowl, theta = Bowl(), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    delta = {"w": torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])}
    found = walk(bowl, {"w": theta}.__getitem__, delta, (-1.0, 0.0, 1.0, 2.0), bowl.loss)
    # 1 (1 + a)^2 + 2 (2 a)^2 + 6
    assert found == [14.0, 7.0, 18.0, 47.0]
    assert torch.equal(bowl.w.detach(), theta)


def test_walk_returns_after_a_failure():
    bowl, theta = Bowl(), torch.ones(2, 3)

    def fails() -> float:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        walk(bowl, {"w": theta}.__getitem__, {"w": torch.ones(2, 3)}, (1.0,), fails)
    assert torch.equal(bowl.w.detach(), theta)


def test_along_tuning_by_hand():
    bowl, theta = Bowl(), torch.ones(2, 3)
    tuned = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 3.0]])
    kept = torch.tensor([[True, True, True], [False, False, False]])
    mask = ParamMask(bits={"w": pack(kept)}, shapes={"w": (2, 3)})
    found = along_tuning(bowl, {"w": theta}.__getitem__, {"w": tuned}.__getitem__, mask, bowl.loss)
    assert found["norms"] == {"ticket": 1.0, "full": math.sqrt(5.0), "complement": 2.0}
    end = found["alphas"].index(1.0)
    losses = {kind: found["losses"][kind][end] for kind in KINDS}
    assert losses == {"ticket": 24.0, "full": 72.0, "complement": 69.0}  # 21 at theta


def test_of_a_model(subject: Subject, mask: ParamMask):
    blocks = tiny.batch(0, 3)

    def loss() -> float:
        return mean_loss(subject.model, blocks, 2)

    before, digest = loss(), weights_digest(subject.model)
    counted: list[int] = []
    found = landscape(
        subject.model, subject.reader(), mask, loss, (0.0, 0.5), [0, 1], counted.append
    )
    assert len(counted) == num_evaluations((0.0, 0.5), [0, 1], tuned=False)
    assert weights_digest(subject.model) == digest
    for kind in KINDS:
        for scale in SCALES:
            curves = found["directions"][kind][scale]
            assert [curve[0] for curve in curves] == [before, before]
            assert len({curve[1] for curve in curves} | {before}) == 3
            assert len(found["norms"][kind][scale]) == 2
    assert found["norms"]["ticket"]["global"][0] == pytest.approx(found["norm"], rel=1e-6)
    for scale in ("per_tensor", "per_row"):
        lengths = [found["norms"][kind][scale][0] for kind in KINDS]
        assert lengths == pytest.approx([lengths[0]] * 3, rel=1e-6)
    norms = sum(p.numel() for p in subject.model.parameters() if p.ndim == 1)
    assert found["moved"]["per_tensor"] == 1 - norms / mask.num_params


def test_mask_of_another_model(subject: Subject, mask: ParamMask):
    longer = dict(mask.shapes) | {EMBED: (tiny.VOCAB + 8, 32)}
    bits = dict(mask.bits) | {EMBED: full_bits((tiny.VOCAB + 8) * 32)}
    padded = mask_on(ParamMask(bits=bits, shapes=longer), subject.model, Path("t"))
    assert padded.shapes == mask.shapes
    assert padded.full(EMBED).all()
    wrong: list[tuple[dict[str, tuple[int, ...]], str]] = [
        (dict(mask.shapes) | {EMBED: (tiny.VOCAB, 16)}, r"\[300, 32\] in t, but \[300, 16\]"),
        ({n: s for n, s in mask.shapes.items() if n != NORM}, "t has another parameter, "),
        (dict(mask.shapes) | {"extra": (2,)}, "t lacks extra"),
    ]
    for shapes, message in wrong:
        bits = {name: full_bits(torch.Size(shape).numel()) for name, shape in shapes.items()}
        other = ParamMask(bits=bits, shapes=shapes)
        with pytest.raises(UserError, match=message):
            mask_on(other, subject.model, Path("t"))
    whole = {name: full_bits(mask.numel(name)) for name in mask.shapes}
    with pytest.raises(UserError, match="keeps all parameters, or none"):
        mask_on(ParamMask(bits=whole, shapes=mask.shapes), subject.model, Path("t"))


def test_other_model_as_fine_tuned(subject: Subject, tmp_path: Path):
    tiny.model(tiny.GPT2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"transformer\.h.*, which this model does not have: name"):
        read_parameters(tmp_path / "gpt2", subject.model)
    tiny.model(tiny.LLAMA_TIED).save_pretrained(tmp_path / "tied")
    with pytest.raises(UserError, match=r"k_proj.weight has shape \[32, 32\], the model's is"):
        read_parameters(tmp_path / "tied", subject.model)
