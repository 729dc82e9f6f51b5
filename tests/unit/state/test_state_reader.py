"""Candidate masks of discovery, as the ranks write them and as format 4 had them."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pmp_ds.state.manifest import DamagedError
from pmp_ds.state.state_reader import StateReader
from pmp_ds.ticket.mask import pack

SHAPES = {"w": (7, 9), "b": (5,), "scalar": ()}


def kept() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.rand(math.prod(shape)) < 0.5 for name, shape in SHAPES.items()}


def by_ranks(folder: Path, borders: dict[str, list[int]]) -> Path:
    """Write fragments that end at ``borders``, in turn by two ranks."""
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, bits in kept().items():
        starts = [0, *borders.get(name, [])]
        for i, (low, high) in enumerate(zip(starts, [*starts[1:], len(bits)], strict=True)):
            files[i % 2][f"newest/{name}/{low}"] = pack(bits[low:high])
    (folder / "state").mkdir(parents=True)
    for rank, tensors in enumerate(files):
        save_file(tensors, folder / f"state/rank-{rank:05d}.safetensors")
    return folder


def in_one_file(folder: Path) -> Path:
    (folder / "state").mkdir(parents=True)
    whole = {f"newest/{name}": pack(bits) for name, bits in kept().items()}
    save_file(whole, folder / "state/masks.safetensors")
    return folder


@pytest.mark.parametrize("form", ["ranks", "one file"])
def test_any_part_of_a_candidate(tmp_path: Path, form: str) -> None:
    made = in_one_file(tmp_path) if form == "one file" else by_ranks(tmp_path, {"w": [3, 40, 41]})
    reader = StateReader(made)
    found = reader.candidate("newest", SHAPES)
    assert found is not None
    assert reader.candidate("best", SHAPES) is None
    for name, whole in kept().items():
        for start in range(len(whole) + 1):
            for count in range(len(whole) - start + 1):
                assert found(name, start, count).equal(whole[start : start + count])


def test_a_part_that_is_lost_or_does_not_fit(tmp_path: Path) -> None:
    lost = by_ranks(tmp_path / "lost", {"w": [16, 40]})
    (lost / "state/rank-00001.safetensors").unlink()
    found = StateReader(lost).candidate("newest", SHAPES)
    assert found is not None
    with pytest.raises(DamagedError, match="newest of w is uint8 of shape"):
        found("w", 0, 63)
    longer = by_ranks(tmp_path / "longer", {})
    found = StateReader(longer).candidate("newest", SHAPES | {"b": (50,)})
    assert found is not None
    with pytest.raises(DamagedError, match="newest of b"):
        found("b", 0, 50)
