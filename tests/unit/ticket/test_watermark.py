"""Watermarks in copies of a ticket, and the recipients that a leak names."""

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pmp_ds.config import MaskConfig, ModelConfig
from pmp_ds.derivative.dither import dither, draw_donors
from pmp_ds.discover.discover import random_ticket
from pmp_ds.errors import UserError
from pmp_ds.model.parameters import parameter_table
from pmp_ds.ticket.fit import fitted
from pmp_ds.ticket.mask import ParamMask, pack
from pmp_ds.ticket.ticket import Ticket
from pmp_ds.ticket.trace import (
    Evidence,
    Observation,
    corrected,
    fitted_to,
    log10_tail,
    named,
    of_model,
    of_ticket,
    resists,
    weigh,
)
from pmp_ds.ticket.watermark import (
    CUTOFF,
    FEWEST,
    SHARE,
    codeword,
    draw_code,
    missing_from,
    without,
)
from tests.helpers import tiny
from tests.helpers.examples import examples

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
        density=density,
        source="earlybird",
        score="mean",
        step=1,
        stable=True,
        model_digest="d" * 64,
    )


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


CODE = key(2**200)


def word_of(of: Ticket, number: int) -> torch.Tensor:
    return codeword(draw_code(of.mask, CODE), key(number))


def copy_for(number: int, of: Ticket) -> Ticket:
    return without(of, draw_code(of.mask, CODE), word_of(of, number))


def dense(t: Ticket) -> torch.Tensor:
    """(num_params,) bool: the whole mask in order."""
    return torch.cat([t.mask.full(name).view(-1) for name in t.mask.shapes])


@examples(25)
@given(st.integers(250, 400), st.integers(60, 95), st.integers(0, 2**64), st.integers(0, 9))
def test_a_copy_lacks_its_codeword_and_nothing_else_changes(rows, percent, number, seed):
    own = ticket(percent / 100, {"a": (rows, 50), "norm": (2000,), "b": (rows, 30)}, seed)
    marked = copy_for(number, own)
    before, after = dense(own), dense(marked)
    assert not (after & ~before).any(), "an element was added"
    word, lacks = word_of(own, number), before & ~after
    assert int(lacks.sum()) == int(word.sum()) == own.mask.num_kept - marked.mask.num_kept
    code = draw_code(own.mask, CODE)
    offsets = {"a": 0, "b": rows * 50 + 2000}
    places = torch.cat([offsets[name] + p for name, p in code.places.items()])
    assert len(places.unique()) == len(code) == max(FEWEST, round(SHARE * own.mask.num_kept))
    assert before[places].all()
    assert torch.equal(lacks[places], word)
    assert marked.mask.full("norm").all(), "a frozen norm is visible in the release"
    assert torch.equal(dense(copy_for(number, own)), after), "not a function of the key"
    assert missing_from(marked, own, Path("x")) == int(word.sum())


def test_codewords_follow_their_chances():
    """500 of them; and every element of the ticket is a place of some run's code as often."""
    own = ticket()
    code = draw_code(own.mask, CODE)
    words = torch.stack([codeword(code, key(n)) for n in range(500)])
    assert len({tuple(word.tolist()) for word in words}) == 500
    assert float(code.chances.min()) >= CUTOFF
    assert float(code.chances.max()) <= 1 - CUTOFF
    # Arcsine law: sin^2 of a uniform angle has mean 1/2; 1/8 less the ends is its variance.
    assert float(code.chances.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(code.chances.var()) == pytest.approx(0.1125, abs=0.005)
    deviation = (words.double().mean(0) - code.chances) / (
        code.chances * (1 - code.chances) / 500
    ).sqrt()
    assert float(deviation.var()) == pytest.approx(1, abs=0.15)
    often = torch.zeros(own.mask.num_params)
    offsets = {"embed": 0, "proj": 12040, "bias": 20040}
    for n in range(40):
        for name, places in draw_code(own.mask, key(n)).places.items():
            often[places + offsets[name]] += 1
    assert not often[~dense(own)].any()
    mean = 40 * len(code) / (own.mask.num_kept - 40)
    markable = often[torch.cat([own.mask.full(n).view(-1) & (n not in WHOLE) for n in SHAPES])]
    # Drawn without repetition: binomial of 40 draws.
    assert float(markable.var()) == pytest.approx(mean * (1 - mean / 40), rel=0.1)


def test_what_is_no_copy():
    own = ticket()
    more = ParamMask(
        bits=dict(own.mask.bits) | {"proj": pack(torch.ones(8000).bool())}, shapes=SHAPES
    )
    for other in (
        ticket(seed=1),
        ticket(0.6),
        ticket(shapes={"x": (3, 3)}),
        Ticket(**vars(own) | {"mask": more}),
    ):
        with pytest.raises(UserError, match="leak is not a copy"):
            missing_from(other, own, Path("leak"))


@examples(40)
@given(st.data())
def test_tail_is_no_less_than_the_exact_one(data):
    """All 2^m outcomes counted."""
    m = data.draw(st.integers(1, 10))
    chances = torch.tensor(
        data.draw(st.lists(st.floats(0.01, 0.99), min_size=m, max_size=m)), dtype=torch.float64
    )
    size = torch.tensor(
        data.draw(st.lists(st.integers(-20, 20), min_size=m, max_size=m)), dtype=torch.float64
    )
    if_true, if_false = (1 - chances) * size, -chances * size
    outcomes = torch.tensor(list(itertools.product([True, False], repeat=m)))
    sums = torch.where(outcomes, if_true, if_false).sum(1)
    weights = torch.where(outcomes, chances, 1 - chances).prod(1)
    for score in sums[:: max(1, len(sums) // 8)].tolist():
        exact = float(weights[sums >= score - 1e-9].sum())
        assert 10 ** log10_tail(score, chances, if_true, if_false) >= exact * (1 - 1e-9)


def test_tail_of_a_large_code():
    """200,000 places: 3 standard deviations, Chernoff's bound of the normal law."""
    chances = torch.full((200_000,), 0.5, dtype=torch.float64)
    one = torch.ones_like(chances)
    bound = log10_tail(3 * math.sqrt(200_000), chances, one, -one)
    assert bound == pytest.approx(-4.5 / math.log(10), abs=0.01)


def words_of(own: Ticket, count: int) -> dict[str, torch.Tensor]:
    return {f"partner {n}": word_of(own, n) for n in range(count)}


def weighed(own: Ticket, count: int, observed: Iterable[Observation]) -> dict[str, Evidence]:
    return weigh(own.mask, draw_code(own.mask, CODE), words_of(own, count), observed)


def noisy(t: Ticket, share: float) -> ParamMask:
    """Return ``t`` with a share of its elements dropped and as many others added."""
    chance = torch.Generator().manual_seed(5)
    bits = {}
    for name, shape in SHAPES.items():
        flip = torch.rand(shape, generator=chance) < share
        bits[name] = pack(t.mask.full(name) ^ flip)
    return ParamMask(bits=bits, shapes=SHAPES)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.15])
def test_a_leaked_ticket_names_its_recipient_alone(share):
    own = ticket()
    evidence = weighed(own, 50, of_ticket(noisy(copy_for(3, own), share)))
    assert named(evidence) == ["partner 3"]
    assert evidence["partner 3"].num_places == len(draw_code(own.mask, CODE))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_nobody_is_named_for_another_copy_or_noise(share):
    """200 innocent recipients; the leak is another recipient's copy."""
    own = ticket()
    evidence = weighed(own, 200, of_ticket(noisy(copy_for(999, own), share)))
    assert named(evidence) == []
    often = sum(found.log10_p < -1 for found in evidence.values())
    assert often <= 200 * 0.1 + 3 * math.sqrt(200 * 0.1 * 0.9), "p is too small too often"


COALITIONS = {
    "union": lambda copies, chance: torch.stack(copies).any(0),
    "intersection": lambda copies, chance: torch.stack(copies).all(0),
    "majority": lambda copies, chance: torch.stack(copies).sum(0) * 2 > len(copies),
    "minority": lambda copies, chance: minority(torch.stack(copies)),
    "one's or another's": lambda copies, chance: one_or_another(torch.stack(copies), chance),
    "and 5% dropped": lambda copies, chance: (
        torch.stack(copies).any(0) & (torch.rand(copies[0].shape, generator=chance) > 0.05)
    ),
}
"""How colluding recipients combine their copies (n,) bool."""


def minority(copies: torch.Tensor) -> torch.Tensor:
    """At each differing place, take the minority's value."""
    having = copies.sum(0)
    return torch.where(
        (having == 0) | (having == len(copies)), having > 0, having * 2 < len(copies)
    )


def one_or_another(copies: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    who = torch.randint(len(copies), copies.shape[1:], generator=chance)
    return copies.gather(0, who[None])[0]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("attack", COALITIONS)
def test_a_coalition_names_one_of_its_own(attack: str, size: int) -> None:
    """Of 25 recipients two or three compare; four coalitions, nobody innocent named."""
    own = ticket()
    chance, hits = torch.Generator().manual_seed(4), 0
    for first in range(0, 4 * size, size):
        members = range(first, first + size)
        copies = [dense(copy_for(n, own)) for n in members]
        leak = COALITIONS[attack](copies, chance).split(
            [s.numel() for s in map(torch.Size, SHAPES.values())]
        )
        mask = ParamMask(
            bits={n: pack(part.view(SHAPES[n])) for n, part in zip(SHAPES, leak, strict=True)},
            shapes=SHAPES,
        )
        found = named(weighed(own, 25, of_ticket(mask)))
        assert set(found) <= {f"partner {n}" for n in members}
        hits += bool(found)
    assert hits == 4, f"{hits} of 4 coalitions were named"


def test_how_many_a_code_resists():
    """Of a small ticket, and of a model of 1.1 billion parameters at density 0.7."""
    assert resists(FEWEST, 50) == 4
    assert resists(1_760, 10) == 3
    assert resists(1_540_000, 100) > 100


def test_more_recipients_need_more_evidence():
    evidence = {str(n): Evidence(10, 3, 9.0, 2.0, -7.0) for n in range(100)}
    assert corrected(evidence, "0") == -5.0
    assert corrected({"0": evidence["0"]}, "0") == -7.0
    assert corrected({str(n): Evidence(10, 3, 0.0, 2.0, 0.0) for n in range(9)}, "0") == 0.0


def save_model(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def base_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}


def tuned_weights(mask: ParamMask, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return weights as after training: kept elements changed, except one in ten that rounding
    hid and rows of the embedding whose tokens never occurred."""
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
    evidence = weighed(own, 50, of_model(base, tuned, own.mask))
    assert named(evidence) == ["partner 3"]
    places = draw_code(own.mask, CODE).places
    came_up = int((places["embed"] // 40 % 2 == 1).sum()) + len(places["proj"])
    assert evidence["partner 3"].num_places == came_up, "rows that never came up count as evidence"


@pytest.mark.parametrize("size", [2, 3])
def test_a_model_tuned_with_the_copies_of_a_coalition(base, tmp_path, size):
    """One in ten changes hidden by rounding, every second row of the embedding never seen."""
    own = ticket(0.7, SHAPES)
    copies = [copy_for(n, own).mask for n in range(size)]
    bits = {n: torch.stack([c.bits[n] for c in copies]) for n in SHAPES}
    union = {n: b[0] if size == 1 else b[0] | b[1] | b[-1] for n, b in bits.items()}
    tuned = save_model(
        tmp_path / "tuned", tuned_weights(ParamMask(bits=union, shapes=SHAPES), torch.bfloat16)
    )
    found = named(weighed(own, 20, of_model(base, tuned, own.mask)))
    assert found
    assert set(found) <= {f"partner {n}" for n in range(size)}


def test_a_model_trained_without_a_ticket_names_nobody(base, tmp_path):
    everything = ParamMask(
        bits={n: pack(torch.ones(s).bool()) for n, s in SHAPES.items()}, shapes=SHAPES
    )
    tuned = save_model(tmp_path / "tuned", tuned_weights(everything, torch.float32))
    own = ticket()
    assert named(weighed(own, 50, of_model(base, tuned, own.mask))) == []


@pytest.mark.parametrize("owner", [True, False])
def test_marks_survive_the_dither_of_the_owner(base, tmp_path, owner):
    """The owner dithers with the whole ticket; a recipient could otherwise erase their own
    marks."""
    own = ticket()
    copy = copy_for(3, own).mask
    before, after = base_weights(), tuned_weights(copy, torch.bfloat16)
    chance = torch.Generator().manual_seed(6)

    def uniforms(count: int) -> torch.Tensor:
        return torch.rand(count, generator=chance, dtype=torch.float64)

    mask = own.mask if owner else copy
    donors = draw_donors(mask, before.__getitem__, after.__getitem__, uniforms)
    hidden = {n: dither(before[n], after[n], mask.full(n), donors, uniforms) for n in SHAPES}
    tuned = save_model(tmp_path / "tuned", hidden)
    found = named(weighed(own, 20, of_model(base, tuned, own.mask)))
    assert found == (["partner 3"] if owner else [])


def test_models_that_cannot_be_compared(base, tmp_path):
    mask = ticket().mask

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            list(of_model(base, folder, mask))

    refused(base, "share no parameter that differs")
    refused(tmp_path / "nowhere", "nowhere is not a folder")
    refused(save_model(tmp_path / "other", {"x": torch.ones(2)}), "share no parameter that differs")
    (tmp_path / "cut").mkdir()
    whole = (base / "model.safetensors").read_bytes()
    (tmp_path / "cut/model.safetensors").write_bytes(whole[:-5])
    refused(tmp_path / "cut", r"cut/model\.safetensors is damaged")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    tiny.model().save_pretrained(tmp_path / "release", max_shard_size="20KB")
    (tmp_path / "release/stray.safetensors").write_bytes(b"not in the index")
    return tmp_path / "release"


def mask_of_model(config: ModelConfig = tiny.LLAMA) -> ParamMask:
    return random_ticket(CODE, MaskConfig(), parameter_table(tiny.model(config))).mask


def test_ticket_of_a_release(release):
    mask = mask_of_model()
    found = fitted_to(mask, release)
    assert list(found.shapes) == list(mask.shapes)
    assert all(found.bits[name].equal(bits) for name, bits in mask.bits.items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(tiny.LLAMA, tie_embeddings=True), "has another parameter, lm_head.weight"),
        (replace(tiny.LLAMA, num_layers=3), r"lacks model\.layers\.2\.input_layernorm\.weight"),
        (replace(tiny.LLAMA, intermediate_size=40), r"has shape \[48, 32\] in .*, but \[40, 32\]"),
    ],
)
def test_ticket_of_another_model(release, other, message):
    with pytest.raises(UserError, match=f"another model: .*{message}"):
        fitted_to(mask_of_model(other), release)


def test_a_release_that_lacks_what_its_config_describes(release):
    index = json.loads((release / "model.safetensors.index.json").read_text())
    file = release / index["weight_map"]["model.norm.weight"]
    content = load_file(file)
    del content["model.norm.weight"]
    save_file(content, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model\.norm\.weight"):
        fitted_to(mask_of_model(), release)


def test_rows_that_only_padded_the_vocabulary_tell_nothing(base, tmp_path):
    """The run's ticket has those rows, and places of the code among them; its release does not."""
    padded = ticket(shapes=SHAPES | {"embed": (320, 40)})
    own = replace(padded, mask=fitted(padded.mask, SHAPES, base))
    whole = {n: padded.mask.full(n) for n in SHAPES}
    missing = {n: ~copy_for(3, padded).mask.full(n) & whole[n] for n in SHAPES}
    lacking = {n: missing[n][: SHAPES[n][0]] for n in SHAPES}
    bits = {n: pack(own.mask.full(n) & ~lacking[n]) for n in SHAPES}
    tuned = save_model(
        tmp_path / "tuned", tuned_weights(ParamMask(bits=bits, shapes=SHAPES), torch.bfloat16)
    )
    assert named(weighed(padded, 50, of_model(base, tuned, own.mask))) == ["partner 3"]
