"""Whole parameters as private safetensors files next to a config.json."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

from pmp_ds.model.folder import read_slice
from pmp_ds.model.parameters import constants
from pmp_ds.run_dir import sha256, write_json
from pmp_ds.tensor_file import write_tensors

INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30
SHARE_BYTES = 64 << 20  # less is not worth a file of its own


@dataclass(frozen=True)
class Layout:
    """Which files contain which tensors, and which rank writes each file."""

    files: tuple[tuple[str, ...], ...]
    num_bytes: int
    writers: int

    @classmethod
    def of(cls, sizes: Mapping[str, int], writers: int = 1) -> "Layout":
        """Cut tensors of these bytes, by name in order, into files of at most SHARD_BYTES, so that
        several ``writers`` have about equal shares of a large model."""
        total = sum(sizes.values())
        limit = min(SHARD_BYTES, max(-(-total // writers), SHARE_BYTES))
        files: list[list[str]] = [[]]
        size = 0
        for name, num_bytes in sizes.items():
            if files[-1] and size + num_bytes > limit:
                files.append([])
                size = 0
            files[-1].append(name)
            size += num_bytes
        return cls(tuple(map(tuple, files)), total, writers)

    def names_of(self, rank: int) -> frozenset[str]:
        """Return the tensors that a rank writes."""
        return frozenset(name for names in self.files[rank :: self.writers] for name in names)

    def file(self, number: int) -> str:
        count = len(self.files)
        return f"model{'' if count == 1 else f'-{number + 1:05d}-of-{count:05d}'}.safetensors"


def save_all(
    tensors: Mapping[str, torch.Tensor], hf_config: PretrainedConfig, folder: Path
) -> None:
    """Write tensors that are in memory, alone."""
    layout = Layout.of({name: tensor.nbytes for name, tensor in tensors.items()})
    save_weights(tensors.items(), layout, hf_config, folder)


def save_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    layout: Layout,
    hf_config: PretrainedConfig | None,
    folder: Path,
    rank: int = 0,
) -> dict[Path, str]:
    """Write one rank's files of Hugging Face safetensors, with at most one file's share in memory;
    rank 0 also writes index and config. Return the files and their sha256.

    ``tensors``: those of ``layout`` in its order, whole where this rank writes them. They are
    consumed to the end, even when writing fails.
    """
    written: dict[Path, str] = {}
    rest = iter(tensors)
    try:
        for number, names in enumerate(layout.files):
            mine = number % layout.writers == rank
            found = {name: tensor for name, tensor in itertools.islice(rest, len(names)) if mine}
            if mine:
                assert tuple(found) == names
                path = folder / layout.file(number)
                written[path] = save_tensors(found, path)
                del found
        if rank == 0:
            written |= _write_descriptions(layout, hf_config, folder)
    finally:
        for _ in rest:  # consuming it may be collective
            pass
    return written


def _write_descriptions(
    layout: Layout, hf_config: PretrainedConfig | None, folder: Path
) -> dict[Path, str]:
    values: dict[Path, Any] = {}
    if len(layout.files) > 1:
        places = enumerate(layout.files)
        weight_map = {name: layout.file(i) for i, names in places for name in names}
        index = {"metadata": {"total_size": layout.num_bytes}, "weight_map": weight_map}
        values[folder / INDEX_FILE] = index
    if hf_config is not None:
        values[folder / "config.json"] = hf_config.to_dict()
    for path, content in values.items():
        write_json(path, content, private=True)
    return {path: sha256(path) for path in values}


def read_weights(folder: Path) -> Callable[[str], torch.Tensor]:
    """Return a function from a parameter's name to its tensor in a ``weights/`` folder."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - not a dict
    return lambda name: where[name].get_tensor(name)


def slices(folder: Path) -> Callable[[str, int, int], torch.Tensor]:
    """Return a function from (name, first element, count) to these elements of a parameter in a
    ``weights/`` folder, (count,), as ``read_slice``."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - not a dict
    return partial(read_slice, where)


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


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Write a safetensors file of CPU tensors, which may be parts of others; 0600 from the first
    byte, fsynced. Return its sha256."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return write_tensors(path, shapes, dtypes, tensors.__getitem__)
