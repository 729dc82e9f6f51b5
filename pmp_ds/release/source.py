"""The input of an export: a private ``weights/`` folder, checked whole before anything is written.

    weights/  config.json  model.safetensors
              or model-00001-of-0000N.safetensors ... and model.safetensors.index.json

Tensors are keyed by ``named_parameters()`` names, tied weights once, all fp32 or all bf16.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pmp_ds.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Opened weights; ``names`` are in the model's own order."""

    folder: Path
    config: PreTrainedConfig
    dtype: torch.dtype
    names: tuple[str, ...]
    sizes: dict[str, int]
    """Elements by name."""

    handles: dict[str, Any]
    """The open file that holds each name."""

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One weight in the release's dtype; raises UserError when it is not finite."""
        tensor: torch.Tensor = self.handles[name].get_tensor(name).to(dtype)
        if not tensor.isfinite().all():
            raise UserError(f"{self.folder}: {name} holds NaN or infinity; export an earlier step")
        return tensor

    @property
    def num_params(self) -> int:
        return sum(self.sizes.values())


def open_source(folder: Path) -> Source:
    """Open ``folder`` and compare it with the model that its config.json describes.

    Raises UserError when a file is missing or damaged, or a name, shape or dtype does not fit.
    """
    config = _config(folder)
    handles: dict[str, Any] = {}
    for path in _files(folder):
        try:
            handle = safe_open(path, "pt")
            handles.update(dict.fromkeys(handle.keys(), handle))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged or missing ({error}): {_WAY_OUT}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: list(param.shape) for name, param in model.named_parameters()}
    for name in shapes.keys() ^ handles.keys():
        kind = "lacks" if name in shapes else "has an unknown tensor"
        raise UserError(f"{folder} {kind} {name}: its config.json and weights do not go together")
    dtypes: set[str] = set()
    for name, shape in shapes.items():
        part = handles[name].get_slice(name)
        dtypes.add(part.get_dtype())
        if part.get_shape() != shape:
            raise UserError(
                f"{folder}: {name} has shape {part.get_shape()} and config.json needs {shape}"
            )
    if len(dtypes) != 1 or not dtypes <= _DTYPES.keys():
        raise UserError(
            f"{folder} holds tensors of {', '.join(sorted(dtypes))}; a run's weights are all F32 "
            "or all BF16"
        )
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    return Source(folder, config, _DTYPES[dtypes.pop()], tuple(shapes), sizes, handles)


_WAY_OUT = "export another checkpoint (--checkpoint STEP)"


def _config(folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: {folder} is not a folder of plain weights")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{path} is not a readable Hugging Face config: {error}") from error


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return [folder / SINGLE_FILE]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error!r}): {_WAY_OUT}") from error
