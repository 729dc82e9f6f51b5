"""The input of an export: a private ``weights/`` folder, checked whole before anything is written.

    weights/  config.json  model.safetensors
              or model-00001-of-0000N.safetensors ... and model.safetensors.index.json

Tensors are keyed by ``named_parameters()`` names, tied weights once, all of one dtype; persistent
buffers by their own names, in their own dtypes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pmp_ds.errors import UserError
from pmp_ds.model.folder import open_folder
from pmp_ds.model.folder_rules import weight_files
from pmp_ds.release.tensor_file import DTYPES, TRAINED, TensorFile, raw_bytes


@dataclass(frozen=True)
class Source:
    """Opened weights, without the rows that only pad the vocabulary."""

    folder: Path
    config: PreTrainedConfig
    """Of the model as it is released."""

    dtype: torch.dtype
    shapes: dict[str, tuple[int, ...]]
    """By name, in the model's own order, as released; the constants last."""

    constants: frozenset[str]
    """Persistent buffers: never trained, so released as they are, whatever the dtype."""

    files: dict[str, TensorFile]
    """The open file that holds each name."""

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One weight in the release's dtype; raises UserError when it is not finite. A constant as
        stored."""
        stored = self.files[name].read(name)
        if self.shapes[name] != tuple(stored.shape):
            stored = stored[: self.shapes[name][0]]
        if name in self.constants:
            return stored
        if not _finite(stored):
            raise UserError(f"{self.folder}: {name} holds NaN or infinity; export an earlier step")
        tensor = stored.to(dtype)
        if dtype == torch.float16 and not _finite(tensor):
            raise UserError(f"dtype=fp16 is refused: {name} has values above 65504: export bf16")
        return tensor

    def digest(self, each: Callable[[int], None] = lambda _: None) -> str:
        """SHA-256 (hex) of names, shapes, dtype and bytes; ``each`` hears how many elements."""
        sha = hashlib.sha256(str(self.dtype).encode())
        for name, shape in self.shapes.items():
            sha.update(f"\n{name}{list(shape)}\n".encode())
            sha.update(raw_bytes(self.tensor(name, self.dtype)))
            each(self.numel(name))
        return sha.hexdigest()

    def released_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Of one tensor in a release of ``dtype``."""
        return DTYPES[self.files[name].dtype(name)] if name in self.constants else dtype

    def numel(self, name: str) -> int:
        return torch.Size(self.shapes[name]).numel()

    @property
    def num_params(self) -> int:
        return sum(self.numel(name) for name in self.shapes if name not in self.constants)

    def nbytes(self, name: str, dtype: torch.dtype) -> int:
        """Of one tensor in a release of ``dtype``."""
        return self.numel(name) * self.released_dtype(name, dtype).itemsize

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _finite(tensor: torch.Tensor) -> bool:
    """A NaN is both the least and the greatest, and this is 50 times as fast as isfinite()."""
    if not tensor.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def open_source(folder: Path, vocab_size: int | None = None) -> Source:
    """Open ``folder`` and compare it with the model that its config.json describes.

    Of a vocabulary padded beyond ``vocab_size`` tokens only that many rows are seen. Raises
    UserError when a file is missing or damaged, or a name, shape or dtype does not fit.
    """
    opened = open_folder(folder)
    config, model = opened.config, opened.skeleton
    files: dict[str, TensorFile] = {}
    for path in weight_files(folder):
        try:
            file = TensorFile(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged or missing ({error}): {_WAY_OUT}") from error
        files.update(dict.fromkeys(file.names, file))
    opened.require_names()
    shapes = opened.shapes
    dtypes = {files[name].dtype(name) for name in shapes}
    if len(dtypes) != 1 or not dtypes <= TRAINED.keys():
        raise UserError(
            f"{folder} holds tensors of {', '.join(sorted(dtypes))}; a run's weights are all of "
            f"one of {', '.join(sorted(TRAINED))}"
        )
    _trim(model, config, shapes, vocab_size)
    constants = opened.constants
    for name in constants:
        if files[name].dtype(name) not in DTYPES:
            raise UserError(f"{folder}: {name} is of the unknown dtype {files[name].dtype(name)}")
    dtype = TRAINED[dtypes.pop()]
    return Source(folder, config, dtype, shapes | constants, frozenset(constants), files)


def _trim(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    shapes: dict[str, tuple[int, ...]],
    vocab_size: int | None,
) -> None:
    """Cut the rows of tokens that do not exist from ``config`` and ``shapes``, in place."""
    if vocab_size is None or vocab_size >= config.vocab_size:
        return
    ends: list[nn.Module | None] = [model.get_input_embeddings(), model.get_output_embeddings()]
    padded = {id(param) for end in ends if end is not None for param in end.parameters()}
    for name, param in model.named_parameters():
        if id(param) in padded:
            assert shapes[name][0] == config.vocab_size, name
            shapes[name] = (vocab_size, *shapes[name][1:])
    config.vocab_size = vocab_size


_WAY_OUT = "export another checkpoint (--checkpoint STEP)"
