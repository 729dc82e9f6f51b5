"""Information about the ticket in the difference between a release and an authorized derivative."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pmp_ds.config import MaskConfig, ModelConfig
from pmp_ds.derivative.derivative import write_dithered
from pmp_ds.derivative.dither import JITTER, Uniforms, dither, draw_donors
from pmp_ds.discover.discover import random_ticket
from pmp_ds.errors import UserError
from pmp_ds.model.parameters import parameter_table
from pmp_ds.ticket.mask import ParamMask, pack
from pmp_ds.ticket.ticket import Ticket, save_ticket
from tests.helpers import tiny

# Large enough for rates within 0.01, small enough for seconds.
MODEL = ModelConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=192,
    max_positions=64,
)
STEPS = 12


def halves(count: int) -> torch.Tensor:
    return torch.full((count,), 0.5, dtype=torch.float64)


def dithered(
    base: torch.Tensor, changed: torch.Tensor, kept: torch.Tensor, draws: Uniforms = halves
) -> torch.Tensor:
    mask = ParamMask(bits={"w": pack(kept)}, shapes={"w": tuple(kept.shape)})
    donors = draw_donors(mask, lambda _: base, lambda _: changed, draws)
    return dither(base, changed, kept, donors, draws)


def test_by_hand() -> None:
    """Half of 12 elements are kept. Every frozen element takes the middle one of its row's
    changes. Rows without changes take those of the one row that keeps more than half; 0.5 means
    no jitter."""
    base = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [5.0, 6.0, 7.0, 8.0]])
    kept = torch.tensor([[True, False, True, True], [False] * 4, [True, True, True, False]])
    changed = base + torch.tensor([[0.25, 0, 0.5, 1], [0, 0, 0, 0], [2, 3, 4, 0]])
    wanted = base + torch.tensor([[0.25, 0.5, 0.5, 1], [3, 3, 3, 3], [2, 3, 4, 3]])
    assert torch.equal(dithered(base, changed, kept), wanted)


def test_changes_are_scaled_apart() -> None:
    base, kept = torch.zeros(1, 4000), torch.arange(4000)[None] % 2 == 0
    changed = base + kept * 1.0
    draws = torch.Generator().manual_seed(0)
    result = dithered(base, changed, kept, lambda n: torch.rand(n, generator=draws).double())
    moved = result[~kept]
    assert 1 - JITTER <= float(moved.min()) < 0.81
    assert 1.19 < float(moved.max()) <= 1 + JITTER
    assert len(moved.unique()) > 1990


@pytest.mark.parametrize("keep", [True, False])
def test_nothing_to_hide_or_to_draw_from(keep: bool) -> None:
    base, kept = torch.randn(3, 5), torch.full((3, 5), keep)
    assert torch.equal(dithered(base, base + kept, kept), base + kept)


def test_rows_and_tensors_do_not_show_their_share() -> None:
    """As in a discovered ticket: rows that changed more are kept more, one tensor is not kept at
    all, one wholly."""
    draws = torch.Generator().manual_seed(0)
    shares = {
        "rows": torch.linspace(0, 1, 400)[:, None],
        "other": torch.linspace(0.5, 1, 200)[:, None],
        "empty": torch.zeros(200, 1),
        "whole": torch.ones(100, 1),
    }
    base = {n: torch.randn(len(s), 96, generator=draws) for n, s in shares.items()}
    kept = {n: torch.rand(len(s), 96, generator=draws) < s for n, s in shares.items()}
    changed = {
        n: base[n] + kept[n] * (0.2 + s) * torch.randn(base[n].shape, generator=draws) / 10
        for n, s in shares.items()
    }
    mask = ParamMask(
        bits={n: pack(k) for n, k in kept.items()},
        shapes={n: (len(s), 96) for n, s in shares.items()},
    )

    def uniforms(count: int) -> torch.Tensor:
        return torch.rand(count, generator=draws, dtype=torch.float64)

    donors = draw_donors(mask, base.__getitem__, changed.__getitem__, uniforms)
    after = {n: dither(base[n], changed[n], kept[n], donors, uniforms) for n in shares}
    for name in shares:
        assert torch.equal(after[name][kept[name]], changed[name][kept[name]])
        assert bool((after[name] != base[name]).any(1).all()), "a row that stands still is proof"
    labels = torch.cat([k.flatten() for k in kept.values()])
    change = torch.cat([(after[n] - base[n]).abs().flatten() for n in shares])
    assert abs(auc(change, labels) - 0.5) < 0.01
    own = kept["rows"].flatten()
    by_row = (after["rows"] - base["rows"]).abs()
    assert auc((by_row / by_row.mean(1, keepdim=True)).flatten(), own) == pytest.approx(
        0.5, abs=0.06
    )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ParamMask]:
    """Return a folder with `base`, its `derivative` after a few updates of the ticket, and
    `ticket`."""
    root = tmp_path_factory.mktemp("tuned")
    model = tiny.model(MODEL)
    mask = random_ticket(b"m" * 32, MaskConfig(), parameter_table(model)).mask
    save_ticket(
        Ticket(
            mask=mask,
            density=0.7,
            source="random",
            score=None,
            step=None,
            stable=True,
            model_digest="d",
        ),
        root / "ticket",
    )
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.bfloat16())
    save(model, root / "base")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    initial = {name: param.detach().clone() for name, param in model.named_parameters()}
    for step in range(STEPS):
        ids = tiny.batch(step, 16)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(torch.where(mask.full(name), param, initial[name]))
    save(model, root / "derivative")
    return root, mask


def save(model: PreTrainedModel, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {name: param.detach().bfloat16() for name, param in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))


def auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Return the area under the ROC curve; ties count half."""
    values, place = scores.unique(return_inverse=True)
    ones = torch.zeros(len(values)).index_add_(0, place, positive.float())
    zeros = torch.zeros(len(values)).index_add_(0, place, (~positive).float())
    below = zeros.cumsum(0) - zeros
    return float((ones * (below + zeros / 2)).sum() / (ones.sum() * zeros.sum()))


def attack(root: Path, derivative: Path, mask: ParamMask) -> dict[str, float]:
    """Return the AUC of one element's change, by attack, over matrices with frozen elements."""
    base, after = load_file(root / "base/model.safetensors"), load_file(derivative)
    names = [name for name in mask.shapes if not bool(mask.full(name).all())]
    kept = torch.cat([mask.full(name).flatten() for name in names])
    old = torch.cat([base[name].float().flatten() for name in names])
    new = torch.cat([after[name].float().flatten() for name in names])
    change = (new - old).abs()
    ulp = 2.0 ** old.abs().clamp(min=1e-30).log2().floor()
    return {
        "change": auc(change, kept),
        "change in units of the last place": auc(change / ulp, kept),
        "any change": auc((change > 0).float(), kept),
    }


def test_an_undithered_derivative_is_the_mask(tuned: tuple[Path, ParamMask]) -> None:
    root, mask = tuned
    found = attack(root, root / "derivative/model.safetensors", mask)
    assert found["change"] > 0.95


def test_a_dithered_one_tells_nothing_by_element(
    tuned: tuple[Path, ParamMask], tmp_path: Path
) -> None:
    root, mask = tuned
    for out in ("one", "two"):
        write_dithered(root / "derivative", root / "base", root / "ticket", tmp_path / out)
    file = tmp_path / "one/model.safetensors"
    assert file.read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    for name, value in attack(root, file, mask).items():
        assert abs(value - 0.5) < 0.03, (name, value)
    wanted, found = load_file(root / "derivative/model.safetensors"), load_file(file)
    for name, tensor in found.items():
        assert torch.equal(tensor[mask.full(name)], wanted[name][mask.full(name)]), name
        assert tensor.dtype == torch.bfloat16
    assert file.stat().st_mode & 0o077 == 0


def copy(root: Path, to: Path, change: Any) -> Path:
    """Return the derivative with other tensors."""
    tensors = load_file(root / "derivative/model.safetensors")
    change(tensors)
    to.mkdir()
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text((root / "derivative/config.json").read_text())
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["lm_head.weight"].add_(1), "elements outside the ticket"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)}), r"has shape \[2, 2\], but"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (dict.clear, None),
    ],
)
def test_what_does_not_belong_together(
    tuned: tuple[Path, ParamMask], tmp_path: Path, change: Any, message: str | None
) -> None:
    root, _ = tuned
    wrong = copy(root, tmp_path / "wrong", change)
    if message is None:
        (wrong / "model.safetensors").unlink()
        message = "model.safetensors is missing"
    with pytest.raises(UserError, match=message):
        write_dithered(wrong, root / "base", root / "ticket", tmp_path / "out")
