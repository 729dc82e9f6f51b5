"""The base of a run with `init.weights`: theta(0) as slices of an untrusted Hugging Face folder.

    base = open_base(Path("folder"), hf_config)
    base.read("model.norm.weight", 0, 32)

Every rank reads what it needs, and nothing is ever whole. Values are fp32, whatever the files have
(fp64 is rounded); the engine rounds them to the training dtype, to nearest, ties to even.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pmp_ds.errors import UserError, quoted
from pmp_ds.model.folder import ModelFolder, few, open_folder, read_slice, shape_of
from pmp_ds.model.parameters import constants

_READ = ("F64", "F32", "F16", "BF16")
_CHUNK = 1 << 22  # elements
_FIRST = 1 << 10  # elements that show most tensors not to be constant

# Settings without an effect on the function that given weights compute.
_OF_ANY = {field.name for field in fields(PreTrainedConfig)}
_FREE = ("token_id", "drop", "pdrop", "use_cache", "initializer", "max_position_embeddings")


@dataclass(frozen=True)
class Base:
    """The folder of `init.weights`."""

    path: Path
    opened: ModelFolder | None
    """None: the folder is gone, and whatever needs theta(0) raises UserError."""

    def require(self, why: str) -> ModelFolder:
        """Return the folder. Raises UserError, with ``why`` it is needed, when it is gone."""
        if self.opened is None:
            raise UserError(
                f"init.weights={self.path} does not exist, and {why}: put the folder back, or "
                "repeat pmp-ds pretrain with --init.weights and its new place"
            )
        return self.opened

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Return elements [start, start + count) of a parameter or persistent buffer, (count,)
        fp32. Raises UserError when they are not finite."""
        handles = self.require("theta(0) is read from it").handles
        values = read_slice(handles, name, start, count).float()
        if count and not all(bool(extreme.isfinite()) for extreme in values.aminmax()):
            raise UserError(f"init.weights={self.path}: {name} has NaN or infinity")
        return values

    @property
    def sizes(self) -> dict[str, int]:
        """The number of elements of every parameter and persistent buffer, in the model's order."""
        opened = self.require("its digest is that of the run's initial weights")
        known = opened.shapes | opened.constants
        return {name: math.prod(shape) for name, shape in known.items()}

    def is_constant(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether a parameter counts as constant at theta(0): a vector, because norms and
        biases start at 1 and 0 and many of their elements still have these values, or one whose
        elements are all equal (unknown, so False, without the folder)."""
        numel = math.prod(shape)
        if len(shape) == 1 or self.opened is None or numel == 0:
            return len(shape) == 1
        first = self.read(name, 0, 1)
        return all(bool((part == first).all()) for part in self._parts(name, numel))

    @torch.no_grad()
    def fill(self, model: PreTrainedModel) -> None:
        """Copy the parameters and persistent buffers into a whole model, fp32 on the CPU."""
        if self.opened is None:
            return
        for name, param in model.named_parameters():
            param.copy_(self.read(name, 0, param.numel()).view(param.shape))
        self.fill_constants(model)

    @torch.no_grad()
    def fill_constants(self, model: PreTrainedModel) -> None:
        """Copy the persistent buffers, in their own dtypes."""
        if self.opened is None:
            return
        for name, buffer in constants(model).items():
            buffer.copy_(self.opened.handles[name].get_tensor(name))

    def _parts(self, name: str, numel: int) -> Iterator[torch.Tensor]:
        yield self.read(name, 0, min(_FIRST, numel))
        for start in range(_FIRST, numel, _CHUNK):
            yield self.read(name, start, min(_CHUNK, numel - start))


def open_base(path: Path, config: PreTrainedConfig) -> Base:
    """Open a folder with safetensors for the model of ``config``, which may be gone.

    Raises UserError when it cannot be trusted or contains another model.
    """
    if not path.exists():
        return Base(path, None)
    try:
        found = open_folder(path)
        _require_same_settings(path, found.config, config)
        opened = replace(found, config=config)
        _require_same_tensors(opened)
        opened.require_room()
    except UserError as error:
        raise UserError(f"init.weights={path}: {error}") from None
    return Base(path, opened)


def _require_same_settings(path: Path, theirs: PreTrainedConfig, ours: PreTrainedConfig) -> None:
    """Raise UserError when the weights would compute another function in the model."""
    there, here = (_decisive(config.to_dict()) for config in (theirs, ours))
    if theirs.model_type != ours.model_type:
        there, here = {"model_type": theirs.model_type}, {"model_type": ours.model_type}
    elif (rows := there.pop("vocab_size", 0)) != (own := here.pop("vocab_size", 0)):
        raise UserError(
            f"its vocabulary has {rows:,} rows, the model's {own:,}: prepare the data with "
            f"--tokenizer {quoted(path)}, or set model.vocab_size={rows} if the data's tokenizer "
            "is its own and further rows are padding"
        )
    differ = [name for name in there if name in here and there[name] != here[name]]
    if differ:
        shown = ", ".join(f"{n}={there[n]!r} (the model: {here[n]!r})" for n in differ[:3])
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UserError(f"its config.json has {shown}{more}: {_WAY_OUT}")


def _decisive(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in values.items()
        if not key.startswith("_")
        and key not in _OF_ANY - {"tie_word_embeddings"}
        and not any(part in key for part in _FREE)
    }


def _require_same_tensors(folder: ModelFolder) -> None:
    """Raise UserError unless the files contain the model's tensors by its own names."""
    known, handles = folder.shapes | folder.constants, folder.handles
    found = {name: shape_of(handles, name) for name in handles}
    differ = [name for name in known if found.get(name) != known[name]]
    tied = set(folder.skeleton.state_dict())  # some files repeat a tied weight
    strange = sorted(found.keys() - known.keys() - tied)
    if differ:
        shown = ", ".join(
            f"{name} {list(found[name]) if name in found else 'missing'} (the model: "
            f"{list(known[name])})"
            for name in differ[:3]
        )
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        way_out = _WAY_OUT if found.keys() & set(differ) else _RENAME
        raise UserError(f"its tensors are not the model's: {shown}{more}: {way_out}")
    if strange:
        raise UserError(f"the model has no {few(strange)}: {_RENAME}")
    for name in folder.shapes:
        kind = handles[name].get_slice(name).get_dtype()
        if kind not in _READ:
            raise UserError(f"{name} is stored as {kind}: convert it to fp32, bf16 or fp16")


_WAY_OUT = (
    "set model.family=auto without model.path, which takes the model from its config.json, or name "
    "a folder of the configured model"
)
_RENAME = (
    "name a folder of the configured model; if only names differ, as in files of older versions "
    "and of mixtures of experts, load it with transformers and save it with "
    "save_pretrained(FOLDER, save_original_format=False)"
)
