"""Rules for a stranger's model folder, checked before anything in it is built or run.

Files: regular, links only inside the folder; safetensors, no pickles, no adapters. config.json: an
architecture of transformers, no code, no quantization, no attention code from the hub, no absurd
sizes. Raises UserError that names the folder or the file.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pmp_ds.errors import UserError
from pmp_ds.foreign import read_object

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-.*\.safetensors")  # transformers prefers them
_ATTENTION = ("eager", "sdpa", "flex_attention")  # others may be downloaded from the hub
# Settings of a config.json that do more than describe an architecture.
_REFUSED_KEYS = {
    "auto_map": "it brings code of its own",
    "custom_pipelines": "it brings code of its own",
    "configuration_files": "it points to another config file",
    "transformers_weights": "it points to another weight file",
    "quantization_config": "it is quantized: name a folder with plain weights",
    "compression_config": "it is quantized: name a folder with plain weights",
}
# The first matching part of a key limits its integers.
_LARGEST = (
    ("layer", 1024),
    ("expert", 1024),
    ("head", 1 << 16),
    ("label", 1 << 16),
    ("vocab", 1 << 24),
    ("position", 1 << 27),
    ("", 1 << 31),
)
_MOST_LAYER_EXPERTS = 1 << 16


def check_files(folder: Path) -> None:
    """Require every entry of ``folder`` to be a regular file or a folder, and no link to leave it.

    In the cache of huggingface_hub, the links of a snapshot lead to `blobs` next to the snapshots.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the folder of a model")
    root = folder.resolve()
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent / "blobs")
    for entry in sorted(folder.iterdir()):
        target = Path(os.path.realpath(entry))  # Path.resolve() raises for a link to itself
        if not any(target.is_relative_to(home) for home in inside):
            raise UserError(f"{entry} is a link that leads out of the folder: copy the file there")
        if not target.exists():
            raise UserError(f"{entry} is a link to nothing: remove it")
        if not (stat.S_ISREG(mode := target.stat().st_mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{entry} is not a regular file: remove it")
        if _DISTRIBUTED.fullmatch(entry.name):
            raise UserError(f"{entry} belongs to a distributed checkpoint: name a plain folder")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} is an adapter: merge it into its model first")


def weight_files(folder: Path) -> list[Path]:
    """Return the model's safetensors files: those of the index, or the only one."""
    check_files(folder)
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if not index.is_file():
        if single.is_file():
            return [single]
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise UserError(
                f"{folder} has no .safetensors file, and {pickles[0]} may run code when it is "
                "read: convert it to safetensors"
            )
        raise UserError(f"{folder} is not a model: {SINGLE_FILE} is missing")
    if single.is_file():
        raise UserError(f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}: remove one of them")
    weight_map = read_object(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{index} is damaged: it has no weight_map from tensors to files")
    for name in sorted(set(names)):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(
                f"{index} points to {name!r:.80}, which is not a .safetensors file in its folder"
            )
        if not (folder / name).is_file():
            raise UserError(f"{folder} is damaged or incomplete: {name} is missing")
    return [folder / name for name in sorted(set(names))]


def check_config(path: Path, values: dict[str, Any]) -> None:
    """Require ``values``, the content of ``path``, to describe an architecture and nothing else."""
    largest = dict.fromkeys(("layer", "expert"), 1)
    for key, value in _items(values):
        if key in _REFUSED_KEYS and value is not None:
            raise UserError(f"{path} has {key}: {_REFUSED_KEYS[key]}")
        if key.endswith(("attn_implementation", "experts_implementation")) and not (
            value is None or isinstance(value, dict) or value in _ATTENTION
        ):
            raise UserError(
                f"{path} has {key}={value!r:.80}, which may be code from the hub; allowed are "
                f"{', '.join(_ATTENTION)}"
            )
        if isinstance(value, int):
            part, most = next((p, m) for p, m in _LARGEST if p in key)
            if abs(value) > most:
                raise UserError(f"{path} has {key}={value:.6g}, more than the {most:,} allowed")
            if part in largest:
                largest[part] = max(largest[part], value)
    if largest["layer"] * largest["expert"] > _MOST_LAYER_EXPERTS:
        raise UserError(
            f"{path} describes {largest['layer']} layers of {largest['expert']} experts, more "
            f"than the {_MOST_LAYER_EXPERTS:,} allowed"
        )


def _items(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key and value at any depth; elements of a list have the key of the list."""
    pending: list[tuple[str, Any]] = list(values.items())
    while pending:
        key, value = pending.pop()
        yield key, value
        if isinstance(value, dict):
            implementation = key if key.endswith("_implementation") else None
            pending += [(implementation or inner, each) for inner, each in value.items()]
        elif isinstance(value, list):
            pending += [(key, each) for each in value]


def first_line(error: Exception) -> str:
    """Return an error's text without details: one line, or two if the first ends in a colon."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    if first.endswith(":") and more:
        first += f" {more[0].strip()}"
    return first[:300]
