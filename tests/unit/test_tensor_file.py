"""Safetensors files that are written and read one tensor, or part of one, at a time."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmp_ds.tensor_file import DTYPES, TensorFile, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {name: torch.randint(0, 2, (3, 4)).to(dtype) for name, dtype in DTYPES.items()}
    part = torch.arange(24.0).view(4, 6)
    return found | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "part": part[1:3]}


def write(path: Path) -> str:
    made = tensors()
    shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
    dtypes = {name: tensor.dtype for name, tensor in made.items()}
    return write_tensors(path, shapes, dtypes, made.__getitem__)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    kind = (one.dtype, one.shape) == (other.dtype, other.shape)
    return kind and one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    digest = write(tmp_path / "a")
    assert digest == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    found = load_file(tmp_path / "a")
    assert found.keys() == tensors().keys()
    assert all(same(found[name], tensor) for name, tensor in tensors().items())


def test_any_part_is_read(tmp_path: Path) -> None:
    save_file({name: t.contiguous() for name, t in tensors().items()}, tmp_path / "a")
    file = TensorFile(tmp_path / "a")
    for name, tensor in tensors().items():
        assert same(file.read(name), tensor)
        flat = tensor.reshape(-1)
        for start in range(flat.numel() + 1):
            for count in range(flat.numel() - start + 1):
                assert same(file.part(name, start, count), flat[start : start + count])
    with pytest.raises(AssertionError):
        file.part("part", 10, 3)
