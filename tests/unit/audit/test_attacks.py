"""Every attack on constructed weights: a planted leak is found, a clean release is at chance."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pmp_ds.audit.case import Case, Shadow, Weights
from pmp_ds.config import Config, InitConfig, MaskConfig
from pmp_ds.errors import UserError
from pmp_ds.model.keys import Secret
from pmp_ds.ticket.mask import full_bits
from tests.helpers import tiny
from tests.unit.audit.conftest import run_one, save, trained

RECIPE = Config(init=InitConfig(seed=42))
BASE = "difference with a known base"


def test_seed_replay_of_a_public_seed(make):
    result = run_one("seed replay", make(42).case(config=RECIPE))
    assert result.verdict == "leak"
    assert result.iou > 0.99
    assert result.auc > 0.99


def test_seed_replay_of_secret_weights_is_at_chance(make):
    for config in (RECIPE, None):
        result = run_one("seed replay", make().case(config=config))
        assert result.verdict == "chance"
        assert result.iou == pytest.approx(result.chance_iou, abs=0.01)
        assert result.auc == pytest.approx(0.5, abs=0.01)


def test_seed_replay_needs_no_ticket(make):
    for init, verdict in ((42, "leak"), (Secret(b"k" * 32), "chance")):
        case = replace(make(init).case(), mask=None)
        assert run_one("seed replay", case).verdict == verdict


def test_brute_force_finds_a_seed_in_its_range(make):
    made = make(1_000_003)
    found = run_one("seed brute force", made.case(seeds=range(1_000_000, 1_000_010)))
    assert found.verdict == "leak"
    assert found.iou > 0.99
    assert "seed 1000003 found after 4" in found.note
    missed = run_one("seed brute force", made.case(seeds=range(1_000_004, 1_000_010)))
    assert missed.verdict == "chance"
    assert missed.note.startswith("none of 6 seeds")


def test_brute_force_finds_the_low_32_bits(make):
    case = make((1 << 40) + 5).case(seeds=range(10))
    assert run_one("seed brute force", case).verdict == "leak"


def test_brute_force_of_a_secret_key(make):
    assert run_one("seed brute force", make().case(seeds=range(50))).verdict == "chance"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_decay_of_the_complement(make, tmp_path, dtype):
    made = make(42)
    factor = 0.9
    leaky = {
        name: torch.where(made.mask.full(name), value.float(), made.initial[name] * factor)
        for name, value in made.tensors.items()
    }
    save(tmp_path / "leaky", {name: value.to(dtype) for name, value in leaky.items()})
    result = run_one(
        "weight decay of the complement",
        Case(release=Weights.open(tmp_path / "leaky"), mask=made.mask, config=RECIPE),
    )
    assert result.verdict == "leak"
    assert result.iou > 0.9
    assert float(result.note.split()[-1]) == pytest.approx(factor, abs=2e-3)
    assert run_one("weight decay of the complement", made.case(config=RECIPE)).verdict == "chance"


def test_two_revisions_and_a_derivative(make, tmp_path):
    made = make()
    later = {n: t.to(torch.bfloat16) for n, t in trained(made.initial, made.mask, seed=2).items()}
    other = save(tmp_path / "later", later)
    for name, given in (
        (BASE, {"base": other}),
        ("derivative: size of change", {"derivative": other}),
    ):
        result = run_one(name, made.case(**given))
        assert result.verdict == "leak"
        assert result.iou > 0.98
        assert run_one(name, made.case()).verdict == "not run"


def test_a_known_base_is_the_mask_and_another_tells_nothing(make, tmp_path):
    made = make(dtype=torch.float32)
    known = run_one(BASE, made.case(base=save(tmp_path / "base", made.initial)))
    assert (known.verdict, known.auc, known.iou) == ("leak", 1.0, 1.0)
    rounded = {name: tensor.bfloat16() for name, tensor in made.initial.items()}
    known = run_one(BASE, made.case(base=save(tmp_path / "rounded", rounded)))
    assert (known.verdict, known.iou > 0.99) == ("leak", True)
    strange = make(Secret(b"s" * 32), name="strange", dtype=torch.float32)
    unknown = run_one(BASE, made.case(base=save(tmp_path / "other", strange.initial)))
    assert unknown.verdict == "chance"
    assert unknown.iou == pytest.approx(unknown.chance_iou, abs=0.01)
    assert run_one(BASE, made.case()).verdict == "not run"


def test_a_known_base_is_proof_without_the_ticket(make, tmp_path):
    made = make()
    for init, verdict in ((b"k", "leak"), (b"s", "chance")):
        other = make(Secret(init * 32), name=f"of-{init.hex()}")
        base = save(tmp_path / init.hex(), {n: t.bfloat16() for n, t in other.initial.items()})
        case = replace(made.case(base=base), mask=None)
        assert run_one(BASE, case).verdict == verdict


def test_a_base_with_padding_in_its_vocabulary(make, tmp_path):
    """A release has no such rows."""
    made = make(dtype=torch.float32)
    more = {
        name: torch.cat([tensor, torch.ones(4, 32)]) if len(tensor) == tiny.VOCAB else tensor
        for name, tensor in made.initial.items()
    }
    base = save(tmp_path / "base", more, vocab_size=tiny.VOCAB + 4)
    for name in (BASE, "weight decay of the complement"):
        assert run_one(name, made.case(base=base)).note
    assert run_one(BASE, made.case(base=base)).iou == 1.0


def test_a_dense_derivative_tells_nothing(make, tmp_path):
    made = make()
    generator = torch.Generator().manual_seed(3)
    moved = {
        name: (value.float() + 0.01 * torch.randn(value.shape, generator=generator)).bfloat16()
        for name, value in made.tensors.items()
    }
    case = made.case(derivative=save(tmp_path / "full", moved))
    for name in ("size of change", "units in the last place"):
        assert run_one(f"derivative: {name}", case).auc == pytest.approx(0.5, abs=0.02)
    unseen = replace(case, mask=None)
    assert run_one("derivative: size of change", unseen).verdict == "chance"


def test_what_stands_still_is_proof_without_the_ticket(make, tmp_path):
    made = make()
    later = {n: t.to(torch.bfloat16) for n, t in trained(made.initial, made.mask, seed=2).items()}
    case = replace(made.case(derivative=save(tmp_path / "later", later)), mask=None)
    assert run_one("derivative: size of change", case).verdict == "leak"


def test_frozen_constants(make):
    leak = run_one("norm and bias constants", make(constants=False, far=0.2).case())
    assert leak.verdict == "leak"
    assert leak.iou > 0.98
    clean = run_one("norm and bias constants", make(far=0.2).case())
    assert clean.verdict == "chance"
    assert clean.auc is None  # all of them are in the ticket


def test_frozen_constants_show_without_a_ticket(make):
    for constants, verdict in ((False, "leak"), (True, "chance")):
        case = replace(make(constants=constants, far=0.2).case(), mask=None)
        assert run_one("norm and bias constants", case).verdict == verdict


@pytest.mark.parametrize("name", ["magnitudes", "magnitudes by tensor"])
def test_magnitudes(make, name):
    grown = run_one(name, make(far=0.06).case())
    assert grown.verdict == "open"
    assert grown.auc > 0.75
    assert not grown.preventable
    still = run_one(name, make(far=0.0).case())  # nothing moved: nothing to see
    assert still.auc == pytest.approx(0.5, abs=0.02)


def test_magnitudes_by_tensor_see_which_tensors_moved(make, tmp_path):
    """One tensor is all trained and the others are not: the tensor itself reveals the mask."""
    made = make()
    bits = {n: torch.zeros_like(b) for n, b in made.mask.bits.items()}
    name = "model.embed_tokens.weight"
    bits[name] = torch.full_like(bits[name], 255)
    mask = replace(made.mask, bits=bits)
    grown = trained(made.initial, mask, far=0.04)
    save(tmp_path / "one", {n: t.bfloat16() for n, t in grown.items()})
    case = Case(release=Weights.open(tmp_path / "one"), mask=mask)
    assert run_one("magnitudes by tensor", case).auc > run_one("magnitudes", case).auc + 0.05


def test_dtype(make, tmp_path):
    made = make()
    frozen = {
        name: torch.where(made.mask.full(name), value, made.initial[name].bfloat16().float())
        for name, value in trained(made.initial, made.mask).items()
    }
    save(tmp_path / "fp32", frozen)
    leak = run_one("dtype", Case(release=Weights.open(tmp_path / "fp32"), mask=made.mask))
    assert leak.verdict == "leak"
    assert leak.iou > 0.99
    assert run_one("dtype", made.case()).verdict == "chance"
    fine = make(dtype=torch.float32, name="fine")  # never rounded
    assert run_one("dtype", fine.case()).verdict == "chance"


@pytest.mark.parametrize("rare", ["rounded", "fine"])
def test_dtype_of_few(make, tmp_path, rare):
    """At a density near 1 or 0, few elements differ from the others in their low bits."""
    made = make(dtype=torch.float32)
    for tensor in made.tensors.values():
        rounded = tensor.flatten()[:: 1 if rare == "fine" else 200]
        rounded.copy_(rounded.bfloat16())
        if rare == "fine":
            tensor.flatten()[::200] *= 1.0001
    save(tmp_path / "few", made.tensors)
    found = run_one("dtype", Case(release=Weights.open(tmp_path / "few"), mask=made.mask))
    assert found.verdict == "leak"


def test_mixed_dtypes(make, tmp_path):
    made = make()
    mixed = made.tensors | {"model.norm.weight": made.tensors["model.norm.weight"].float()}
    save(tmp_path / "mixed", mixed)
    assert run_one("dtype", Case(release=Weights.open(tmp_path / "mixed"))).verdict == "leak"


def test_optimizer_tensors_and_files(make):
    made = make()
    assert run_one("optimizer files", made.case()).verdict == "chance"
    (made.folder / "zero_optim_states.pt").write_bytes(b"never unpickled")
    assert run_one("optimizer files", made.case()).verdict == "leak"
    moments = {f"{name}.exp_avg_sq": made.mask.full(name).float() for name in made.mask.shapes}
    save_file(moments, made.folder / "extra.safetensors")
    result = run_one("optimizer files", made.case())
    assert result.iou == 1.0
    assert result.verdict == "leak"


@pytest.mark.parametrize("name", ["theta0.json", "private/key", "model.bin", "config.json.bak"])
def test_forbidden_files(make, name):
    made = make()
    assert run_one("forbidden files", made.case()).verdict == "chance"
    path = made.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    result = run_one("forbidden files", made.case())
    assert result.verdict == "leak"
    assert name in result.note


def test_shadow_model_learns_from_a_run_of_its_own(make):
    shadow = make(Secret(b"s" * 32), name="shadow", mask_seed=5, far=0.06)
    given = Shadow(Weights.open(shadow.folder), shadow.mask)
    grown = run_one("shadow model", make(far=0.06).case(shadow=given))
    assert grown.verdict == "open"
    assert grown.auc > run_one("magnitudes", make(far=0.06).case()).auc - 0.01
    # an unrelated random mask on weights that did not move: nothing is learnt
    calm = make(Secret(b"c" * 32), name="calm", mask_seed=6, far=0.0)
    given = Shadow(Weights.open(calm.folder), calm.mask)
    still = run_one("shadow model", make(far=0.0).case(shadow=given))
    assert still.auc == pytest.approx(0.5, abs=0.03)
    assert still.auc_outside_embeddings == pytest.approx(0.5, abs=0.03)


def test_a_known_quota_ranks_inside_tensors(make):
    made = make(far=0.06)
    known = Config(mask=MaskConfig(quota="per_tensor"))
    plain, ranked = (made.case(), made.case(config=known))
    scores = torch.cat([torch.full((n,), float(i)) for i, n in enumerate(plain.sizes())])
    assert torch.equal(plain.by_tensor(scores), scores)
    assert len(ranked.by_tensor(scores).unique()) == 1


def test_a_sample_gives_nearly_the_same_rates(make):
    made = make(far=0.06)
    whole, part = made.case(), made.case(sample_size=5_000)
    assert sum(part.sizes()) < 6_000 < sum(whole.sizes())
    rates = [run_one("magnitudes", case) for case in (whole, part)]
    assert rates[0].auc == pytest.approx(rates[1].auc, abs=0.03)
    assert rates[0].iou == pytest.approx(rates[1].iou, abs=0.03)


def test_a_ticket_of_another_model(make):
    made = make()
    name = "model.norm.weight"
    other = replace(
        made.mask,
        bits=dict(made.mask.bits) | {name: full_bits(31)},
        shapes=dict(made.mask.shapes) | {name: (31,)},
    )
    with pytest.raises(UserError, match="the ticket belongs to another model"):
        replace(made.case(), mask=other)


def test_no_release(make, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        Weights.open(tmp_path)
    made = make()
    tensors = dict(made.tensors)
    del tensors["lm_head.weight"]
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        save(tmp_path / "part", tensors)
