"""Whole parameters as private safetensors files next to a config.json."""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from pmp_ds import dist
from pmp_ds.model.parameters import constants
from pmp_ds.run_dir import write_json

INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30


def save_weights(
    parameters: Iterable[tuple[str, torch.Tensor]], hf_config: PretrainedConfig | None, folder: Path
) -> None:
    """Write whole parameters as Hugging Face safetensors, with at most one file's share in memory.
    Every rank consumes ``parameters`` to the end, even when rank 0, which writes, fails."""
    rest = iter(parameters)
    try:
        if dist.rank() == 0:
            _write_shards(rest, hf_config, folder)
    finally:
        for _ in rest:  # consuming it may be collective
            pass


def _write_shards(
    parameters: Iterator[tuple[str, torch.Tensor]], hf_config: PretrainedConfig | None, folder: Path
) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_tensors(pending, folder / f"part-{len(shards)}")
        shards.append(list(pending))
        pending.clear()

    for name, tensor in parameters:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    count = len(shards)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        part = "" if count == 1 else f"-{i + 1:05d}-of-{count:05d}"
        file = f"model{part}.safetensors"
        os.replace(folder / f"part-{i}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index, private=True)
    if hf_config is not None:
        write_json(folder / "config.json", hf_config.to_dict(), private=True)


def read_weights(folder: Path) -> Callable[[str], torch.Tensor]:
    """Return a function from a parameter's name to its tensor in a ``weights/`` folder."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - not a dict
    return lambda name: where[name].get_tensor(name)


def slices(folder: Path) -> Callable[[str, int, int], torch.Tensor]:
    """Return a function from (name, first element, count) to these elements of a parameter in a
    ``weights/`` folder, (count,). It reads whole rows, and no more of them than it needs."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - not a dict

    def read(name: str, start: int, count: int) -> torch.Tensor:
        stored = where[name].get_slice(name)
        if not stored.get_shape():
            return where[name].get_tensor(name).view(1)[start:][:count]
        rows, *row = stored.get_shape()
        size = math.prod(row)
        low, high = start // size, min(rows, -(-(start + count) // size))
        part: torch.Tensor = stored[low:high]
        return part.reshape(-1)[start - low * size :][:count]

    return read


@torch.no_grad()
def load_constants(folder: Path, model: torch.nn.Module) -> None:
    """Load a model's persistent buffers from a ``weights/`` folder. It keeps its own if an older
    pmp-ds did not write them."""
    stored = read_weights(folder)
    for name, buffer in constants(model).items():
        with contextlib.suppress(KeyError):
            buffer.copy_(stored(name))


@torch.no_grad()
def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Load a model's parameters and constants from a ``weights/`` folder, cast to its dtype."""
    stored = read_weights(folder)
    for name, param in model.named_parameters():
        param.copy_(stored(name))
    load_constants(folder, model)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, 0600 from the first byte, fsynced."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    save_file(tensors, path)
    path.chmod(0o600)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
