"""Marks in copies of a ticket, and whom a leak names."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pmp_ds.errors import UserError
from pmp_ds.ticket.mask import ParamMask, pack
from pmp_ds.ticket.ticket import Ticket
from pmp_ds.ticket.trace import (
    Evidence,
    corrected,
    fitted_to,
    log10_tail,
    named,
    of_model,
    of_ticket,
    weigh,
)
from pmp_ds.ticket.watermark import draw_marks, missing_from, without

SHAPES = {"embed": (300, 40), "norm": (40,), "proj": (200, 40), "bias": (7,)}
WHOLE = {"norm"}  # trained always


def ticket(density: float = 0.7, shapes=SHAPES, seed: int = 0) -> Ticket:
    generator = torch.Generator().manual_seed(seed)
    kept = {
        name: torch.rand(shape, generator=generator) < (1 if name in WHOLE else density)
        for name, shape in shapes.items()
    }
    return Ticket(
        mask=ParamMask(bits={n: pack(mask) for n, mask in kept.items()}, shapes=shapes),
        density=density, source="earlybird", score="mean", step=1, stable=True,
        model_digest="d" * 64,
    )  # fmt: skip


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def copy_for(number: int, of: Ticket) -> Ticket:
    return without(of, draw_marks(of.mask, key(number)))


def dense(t: Ticket) -> torch.Tensor:
    """(num_params,) bool: the whole mask in order."""
    return torch.cat([t.mask.full(name).view(-1) for name in t.mask.shapes])


@settings(deadline=None, max_examples=60)
@given(st.integers(150, 400), st.integers(10, 95), st.integers(0, 2**64), st.integers(0, 9))
def test_a_copy_lacks_a_thousandth_and_nothing_else_changes(rows, percent, number, seed):
    own = ticket(percent / 100, {"a": (rows, 50), "norm": (2000,), "b": (rows, 30)}, seed)
    marked = copy_for(number, own)
    before, after = dense(own), dense(marked)
    assert not (after & ~before).any(), "an element was added"
    wanted = round(Fraction(own.mask.num_kept, 1000))
    assert own.mask.num_kept - marked.mask.num_kept == int((before & ~after).sum()) == wanted
    assert marked.mask.full("norm").all(), "a frozen norm shows itself"
    assert torch.equal(dense(copy_for(number, own)), after), "not a function of the key"
    assert missing_from(marked, own, Path("x")) == wanted


def test_recipients_differ_and_marks_are_spread_evenly():
    own = ticket()
    lost = [dense(own) & ~dense(copy_for(n, own)) for n in range(500)]
    assert len({tuple(one.nonzero().view(-1).tolist()) for one in lost}) == 500
    # Every kept element is marked equally often: 500 x 14 marks over 14,000 elements, Poisson.
    times = torch.stack(lost).sum(0)[dense(own) & ~dense(ticket(0.0))]
    marks = int(lost[0].sum())
    mean = 500 * marks / (own.mask.num_kept - 40)
    assert abs(float(times.double().var()) / mean - 1) < 0.1
    first_half = int(torch.stack(lost)[:, :12000].sum())
    share = own.mask.full("embed").sum() / (own.mask.num_kept - 40)
    assert abs(first_half / (500 * marks) - float(share)) < 0.03


@pytest.mark.parametrize(
    "of", [ticket(0.7, {"a": (20, 20)}), ticket(1.0), ticket(0.0)], ids=["small", "full", "empty"]
)
def test_a_ticket_that_cannot_be_marked(of):
    with pytest.raises(UserError, match="--no-watermark"):
        draw_marks(of.mask, key(1))


def test_what_is_no_copy():
    own = ticket()
    more = ParamMask(
        bits=dict(own.mask.bits) | {"proj": pack(torch.ones(8000).bool())}, shapes=SHAPES
    )
    for other in (ticket(seed=1), ticket(0.6), copy_for(2, copy_for(1, own)), ticket(shapes={
        "x": (3, 3)}), Ticket(**vars(own) | {"mask": more})):  # fmt: skip
        with pytest.raises(UserError, match="leak is no copy"):
            missing_from(other, own, Path("leak"))


@settings(deadline=None)
@given(st.data())
def test_tail_is_the_exact_one(data):
    total = data.draw(st.integers(1, 60))
    special, drawn = data.draw(st.integers(0, total)), data.draw(st.integers(0, total))
    found = data.draw(st.integers(max(0, drawn - total + special), min(drawn, special)))
    ways = sum(
        math.comb(special, i) * math.comb(total - special, drawn - i)
        for i in range(found, min(drawn, special) + 1)
    )
    exact = math.log10(Fraction(ways, math.comb(total, drawn)))
    assert log10_tail(found, drawn, special, total) == pytest.approx(exact, abs=1e-9)


def test_tail_of_large_numbers():
    """1.1 billion elements: half of 770,000 marks unchanged by chance, then all of them."""
    assert log10_tail(385_000, 770_000, 385_000_000, 770_000_000) == pytest.approx(-0.3, abs=0.01)
    everything = log10_tail(770_000, 770_000, 385_000_000, 770_000_000)
    assert everything == pytest.approx(-231_800, rel=1e-2)


def marks_of(own: Ticket, count: int) -> dict[str, dict[str, torch.Tensor]]:
    return {f"partner {n}": dict(draw_marks(own.mask, key(n))) for n in range(count)}


def noisy(t: Ticket, share: float) -> ParamMask:
    """``t`` with a share of its elements dropped and as many others added."""
    chance = torch.Generator().manual_seed(5)
    bits = {}
    for name, shape in SHAPES.items():
        flip = torch.rand(shape, generator=chance) < share
        bits[name] = pack(t.mask.full(name) ^ flip)
    return ParamMask(bits=bits, shapes=SHAPES)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.15])
def test_a_leaked_ticket_names_its_recipient_alone(share):
    own = ticket()
    evidence = weigh(own.mask, marks_of(own, 50), of_ticket(noisy(copy_for(3, own), share)))
    assert named(evidence) == ["partner 3"]
    found = evidence["partner 3"]
    assert found.population_lacking >= found.num_marks > 13


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_nobody_is_named_for_another_copy_or_noise(share):
    """200 innocent recipients, and the leak is of somebody else's copy."""
    own = ticket()
    evidence = weigh(own.mask, marks_of(own, 200), of_ticket(noisy(copy_for(999, own), share)))
    assert named(evidence) == []
    often = sum(found.log10_p < -1 for found in evidence.values())
    assert often <= 200 * 0.1 + 3 * math.sqrt(200 * 0.1 * 0.9), "p is too small too often"


def test_two_copies_together():
    own = ticket()
    one, two = copy_for(0, own).mask, copy_for(1, own).mask
    both = ParamMask(bits={n: one.bits[n] & two.bits[n] for n in SHAPES}, shapes=SHAPES)
    either = ParamMask(bits={n: one.bits[n] | two.bits[n] for n in SHAPES}, shapes=SHAPES)
    recipients = marks_of(own, 5)
    assert named(weigh(own.mask, recipients, of_ticket(both))) == ["partner 0", "partner 1"]
    assert named(weigh(own.mask, recipients, of_ticket(either))) == []


def test_more_recipients_need_more_evidence():
    evidence = {str(n): Evidence(10, 3, 1000, 100) for n in range(100)}
    p = evidence["0"].log10_p
    assert corrected(evidence, "0") == min(0.0, p + 2)
    assert corrected({"0": evidence["0"]}, "0") == p


def save_model(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def base_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}


def tuned_weights(mask: ParamMask, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As after training: kept elements changed, but for one in ten that rounding hid and rows of
    the embedding whose tokens never came up."""
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for name, old in base_weights().items():
        visible = torch.rand(old.shape, generator=generator) < 0.9
        if name == "embed":
            visible[::2] = False
        step = torch.where(mask.full(name) & visible, old.abs() * 0.1, 0)
        weights[name] = old.to(dtype) + step.to(dtype)
    return weights


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", base_weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_names_its_recipient_alone(base, tmp_path, dtype):
    own = ticket()
    weights = tuned_weights(copy_for(3, own).mask, dtype)
    # A new head, more tokens and no bias: what cannot be compared is left out.
    weights |= {"score": torch.ones(2, 40)}
    del weights["bias"]
    tuned = save_model(tmp_path / "tuned", weights)
    evidence = weigh(own.mask, marks_of(own, 50), of_model(base, tuned, own.mask))
    assert named(evidence) == ["partner 3"]
    found = evidence["partner 3"]
    assert found.num_lacking == found.num_marks
    kept_rows = own.mask.full("embed")[1::2].sum() + own.mask.full("proj").sum()
    assert found.population == int(kept_rows), "rows that never came up count as evidence"


def test_a_model_trained_without_a_ticket_names_nobody(base, tmp_path):
    everything = ParamMask(
        bits={n: pack(torch.ones(s).bool()) for n, s in SHAPES.items()}, shapes=SHAPES
    )
    tuned = save_model(tmp_path / "tuned", tuned_weights(everything, torch.float32))
    own = ticket()
    assert named(weigh(own.mask, marks_of(own, 50), of_model(base, tuned, own.mask))) == []


def test_models_that_cannot_be_compared(base, tmp_path):
    mask = ticket().mask

    def refused(folder: Path, message: str, base: Path = base) -> None:
        with pytest.raises(UserError, match=message):
            list(of_model(base, folder, mask))

    refused(base, "differ in no parameter")
    refused(tmp_path / "nowhere", "nowhere is not a folder")
    other = save_model(tmp_path / "other", {"x": torch.ones(2)})
    refused(other, "differ in no parameter")
    refused(base, "belongs to another model: .*other lacks bias", base=other)
    (tmp_path / "cut").mkdir()
    whole = (base / "model.safetensors").read_bytes()
    (tmp_path / "cut/model.safetensors").write_bytes(whole[:-5])
    refused(tmp_path / "cut", r"cut/model\.safetensors is damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "lacks bias"),
        ({"new": torch.ones(2)}, "has another parameter, new"),
        ({"proj": torch.ones(40, 200)}, r"proj has shape \[40, 200\] in .* and \[200, 40\]"),
    ],
)
def test_ticket_of_another_model(tmp_path, change, message):
    weights = {n: w for n, w in (base_weights() | change).items() if w is not None}
    with pytest.raises(UserError, match=f"another model: .*{message}"):
        fitted_to(ticket().mask, save_model(tmp_path / "m", weights))


def test_shards_are_read_by_their_index(tmp_path, base):
    weights = base_weights()
    for number, name in enumerate(weights):
        save_file({name: weights[name]}, tmp_path / f"{number}.safetensors")
    (tmp_path / "stray.safetensors").write_bytes(b"not listed")
    files = ", ".join(f'"{name}": "{n}.safetensors"' for n, name in enumerate(weights))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{files}}}}}')
    fitted_to(ticket().mask, tmp_path)
