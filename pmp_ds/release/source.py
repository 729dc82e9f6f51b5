"""The input of an export: a private ``weights/`` folder, fully checked before anything is written.

    weights/  config.json  model.safetensors
              or model-00001-of-0000N.safetensors ... and model.safetensors.index.json

Tensors have ``named_parameters()`` names, tied weights once, all with one dtype; persistent buffers
have their own names and dtypes.
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
from pmp_ds.model.experts import PLAIN, needs_plain
from pmp_ds.model.folder import open_folder
from pmp_ds.model.folder_rules import weight_files
from pmp_ds.tensor_file import DTYPES, TRAINED, TensorFile, raw_bytes


@dataclass(frozen=True)
class Source:
    """Opened weights, without rows that only pad the vocabulary."""

    folder: Path
    config: PreTrainedConfig
    """The config of the model as released."""

    dtype: torch.dtype
    shapes: dict[str, tuple[int, ...]]
    """Shapes by name, in the model's own order, as released; the constants come last."""

    constants: frozenset[str]
    """Persistent buffers: never trained, so released unchanged, whatever the dtype."""

    files: dict[str, TensorFile]
    """The open file of each name."""

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return one weight in the release's dtype, or a constant as stored. Raises UserError when
        it is not finite."""
        stored = self.files[name].read(name)
        if self.shapes[name] != tuple(stored.shape):
            stored = stored[: self.shapes[name][0]]
        if name in self.constants:
            return stored
        if not _finite(stored):
            raise UserError(f"{self.folder}: {name} has NaN or infinity; export an earlier step")
        tensor = stored.to(dtype)
        if dtype == torch.float16 and not _finite(tensor):
            raise UserError(f"dtype=fp16 is refused: {name} has values above 65504: export bf16")
        return tensor

    def digest(self, each: Callable[[int], None] = lambda _: None) -> str:
        """Return the SHA-256 (hex) of names, shapes, dtype and bytes; ``each`` gets sizes read."""
        sha = hashlib.sha256(str(self.dtype).encode())
        for name, shape in self.shapes.items():
            sha.update(f"\n{name}{list(shape)}\n".encode())
            sha.update(raw_bytes(self.tensor(name, self.dtype)))
            each(self.numel(name))
        return sha.hexdigest()

    def released_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of one tensor in a release of ``dtype``."""
        return DTYPES[self.files[name].dtype(name)] if name in self.constants else dtype

    def numel(self, name: str) -> int:
        return torch.Size(self.shapes[name]).numel()

    @property
    def num_params(self) -> int:
        return sum(self.numel(name) for name in self.shapes if name not in self.constants)

    def nbytes(self, name: str, dtype: torch.dtype) -> int:
        """Return the bytes of one tensor in a release of ``dtype``."""
        return self.numel(name) * self.released_dtype(name, dtype).itemsize

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are finite: NaN is both minimum and maximum, which is 50 times as
    fast as isfinite()."""
    if not tensor.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def open_source(folder: Path, vocab_size: int | None = None) -> Source:
    """Open ``folder`` and compare it with the model that its config.json describes.

    Rows beyond ``vocab_size`` tokens of a padded vocabulary are ignored. Raises UserError when a
    file is missing or damaged, or a name, shape or dtype does not fit.
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
            f"{folder} contains tensors of {', '.join(sorted(dtypes))}; a run's weights have a "
            f"single dtype, one of {', '.join(sorted(TRAINED))}"
        )
    _trim(model, config, shapes, vocab_size)
    if needs_plain(model):
        config._experts_implementation = PLAIN  # which its release names
    constants = opened.constants
    for name in constants:
        if files[name].dtype(name) not in DTYPES:
            raise UserError(f"{folder}: {name} has the unknown dtype {files[name].dtype(name)}")
    dtype = TRAINED[dtypes.pop()]
    return Source(folder, config, dtype, shapes | constants, frozenset(constants), files)


def _trim(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    shapes: dict[str, tuple[int, ...]],
    vocab_size: int | None,
) -> None:
    """Cut rows of tokens that do not exist from ``config`` and ``shapes``, in place."""
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
