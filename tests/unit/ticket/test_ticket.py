import json
import os
import stat
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmp_ds.errors import UserError
from pmp_ds.ticket.mask import ParamMask, pack
from pmp_ds.ticket.ticket import (
    MANIFEST_FILE,
    MASK_FILE,
    Ticket,
    exact_k,
    has_ticket,
    load_ticket,
    save_ticket,
)
from tests.helpers.examples import examples

SHAPES = {"z.weight": (4, 5), "a.bias": (11,), "scalar": ()}  # not in the order of the alphabet


def ticket(seed: int = 0) -> Ticket:
    generator = torch.Generator().manual_seed(seed)
    kept = {name: torch.rand(shape, generator=generator) < 0.7 for name, shape in SHAPES.items()}
    return Ticket(
        mask=ParamMask(bits={name: pack(mask) for name, mask in kept.items()}, shapes=SHAPES),
        density=0.7,
        source="earlybird",
        score="mean",
        step=17,
        stable=True,
        model_digest="d" * 64,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_ticket(ticket(), tmp_path / "ticket")
    return tmp_path / "ticket"


@pytest.mark.parametrize("score", ["mean", None])
def test_round_trip(tmp_path, score):
    original = replace(ticket(), score=score, step=17 if score else None)
    assert not has_ticket(tmp_path / "t")
    save_ticket(original, tmp_path / "t")
    assert has_ticket(tmp_path / "t")
    loaded = load_ticket(tmp_path / "t", model_digest="d" * 64)
    assert replace(loaded, mask=original.mask) == original
    assert list(loaded.mask.shapes.items()) == list(SHAPES.items()), "the element order changed"
    assert list(loaded.mask.bits) == list(SHAPES), "safetensors gives them in any order"
    for name in SHAPES:
        assert torch.equal(loaded.mask.bits[name], original.mask.bits[name])
    assert loaded.id == original.id


def test_saving_again_replaces(saved):
    save_ticket(ticket(1), saved)
    assert load_ticket(saved).id == ticket(1).id
    assert sorted(p.name for p in saved.iterdir()) == sorted([MASK_FILE, MANIFEST_FILE])


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_private_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_ticket(ticket(), tmp_path / "t")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "t").iterdir()}
    assert modes == {MASK_FILE: 0o600, MANIFEST_FILE: 0o600}
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o700


def test_manifest_is_for_reading(saved):
    manifest = json.loads((saved / MANIFEST_FILE).read_text())
    assert manifest["num_params"] == 32
    assert manifest["num_kept"] == ticket().mask.num_kept
    assert (manifest["density"], manifest["score"], manifest["step"]) == (0.7, "mean", 17)


def flipped(bits: torch.Tensor, bit: int) -> torch.Tensor:
    changed = bits.clone()
    changed[bit // 8] ^= 1 << bit % 8
    return changed


@pytest.mark.parametrize(("name", "bit"), [("z.weight", 0), ("z.weight", 19), ("scalar", 0)])
def test_id_changes_with_one_bit(name, bit):
    original = ticket()
    bits = dict(original.mask.bits) | {name: flipped(original.mask.bits[name], bit)}
    assert replace(original, mask=ParamMask(bits=bits, shapes=SHAPES)).id != original.id


def test_id_depends_on_names_and_shapes_and_on_nothing_else():
    original = ticket()
    bits = original.mask.bits
    other_shape = ParamMask(bits=bits, shapes=SHAPES | {"z.weight": (5, 4)})
    other_name = ParamMask(
        bits={"y" if n == "scalar" else n: b for n, b in bits.items()},
        shapes={"y" if n == "scalar" else n: s for n, s in SHAPES.items()},
    )
    ids = {original.id, *(replace(original, mask=m).id for m in (other_shape, other_name))}
    assert len(ids) == 3
    assert replace(original, density=0.5, source="random", score=None, step=1).id == original.id


def test_repr_shows_nothing_of_the_content():
    assert repr(ticket(0)) == repr(ticket(1))


def edit(**changes):
    """A damage: replace entries of the manifest; None removes one."""

    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST_FILE).read_text()) | changes
        manifest = {k: v for k, v in manifest.items() if v is not None}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))

    return apply


def rewrite(file: str, change):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def flip_byte(offset: int, bit: int):
    return lambda data: data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]


DAMAGES = {
    "manifest missing": (lambda f: (f / MANIFEST_FILE).unlink(), "ticket.json is missing"),
    "mask missing": (lambda f: (f / MASK_FILE).unlink(), "mask.safetensors is missing"),
    "manifest cut": (rewrite(MANIFEST_FILE, lambda d: d[:50]), "damaged"),
    "manifest empty": (rewrite(MANIFEST_FILE, lambda _: b""), "damaged"),
    "manifest not text": (rewrite(MANIFEST_FILE, flip_byte(20, 7)), "damaged"),
    "manifest a list": (rewrite(MANIFEST_FILE, lambda _: b"[]"), "damaged"),
    "parameters a list": (edit(parameters=["z.weight"]), "damaged"),
    "parameters gone": (edit(parameters=None), "damaged"),
    "unknown parameter": (edit(parameters={"new": [3]}), "damaged"),
    "other shape": (edit(parameters={n: [*s, 1] for n, s in SHAPES.items()}), "do not match"),
    "other count": (edit(num_kept=3), "do not match"),
    "other id": (edit(id="0" * 64), "do not match"),
    "mask cut": (rewrite(MASK_FILE, lambda d: d[:-1]), "damaged"),
    "mask cut in its header": (rewrite(MASK_FILE, lambda d: d[:20]), "damaged"),
    "mask empty": (rewrite(MASK_FILE, lambda _: b""), "damaged"),
    "one bit of the mask": (rewrite(MASK_FILE, flip_byte(-5, 3)), "do not match"),
    "one bit of the header's length": (rewrite(MASK_FILE, flip_byte(7, 6)), "damaged"),
    "newer format": (edit(format_version=2), "format 2, which a later version of pmp-ds reads;"),
    "no format": (edit(format_version=None), "damaged"),
    "newer format, other fields": (
        lambda f: (edit(format_version=2, parameters=None)(f), (f / MASK_FILE).unlink()),
        "has format 2, which a later version",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_wrong_is_one_user_error(saved, damage, message):
    damage(saved)
    with pytest.raises(UserError, match=message) as caught:
        load_ticket(saved)
    assert str(saved) in str(caught.value), "the error does not name the folder"


def test_no_folder_at_all(tmp_path):
    with pytest.raises(UserError, match=r"no ticket at .*nowhere"):
        load_ticket(tmp_path / "nowhere")


def test_ticket_of_another_model(saved):
    with pytest.raises(UserError, match="belongs to a model with other parameters"):
        load_ticket(saved, model_digest="e" * 64)


@pytest.mark.parametrize(
    ("density", "d", "k"),
    [
        (0.7, 10, 7),
        (0.29, 100, 29),  # in floating point 28.999999999999996
        (0.57, 100, 57),  # 56.99999999999999
        (1e-9, 10, 1),
        (0.75, 10, 7),
        (1.0, 10, 10),
        (0.1, 1_100_048_384, 110_004_838),
        (0.7, 1_100_048_384, 770_033_868),
    ],
)
def test_exact_k_by_hand(density, d, k):
    assert exact_k(density, d) == k


@examples()
@given(st.integers(1, 1000), st.integers(1, 2_000_000_000))
def test_exact_k_is_the_floor_of_the_decimal(thousandths, d):
    assert exact_k(thousandths / 1000, d) == max(1, Fraction(thousandths, 1000) * d // 1)
