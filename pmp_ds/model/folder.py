"""Open a Hugging Face model folder: the single entry point for every command.

    model = open_folder(Path("release")).load()

Nothing in the folder is executed and nothing outside it is read. Faults raise UserError before
memory is allocated (folder_rules.py). No tensor may be missing, because transformers would draw it.
"""

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from pmp_ds.errors import UserError, shown
from pmp_ds.foreign import read_object
from pmp_ds.model import experts, folder_rules  # noqa: F401 - experts of any width compute
from pmp_ds.model.folder_rules import CONFIG_FILE, first_line
from pmp_ds.model.parameters import constants, shapes, trained_shapes
from pmp_ds.model.tokenizer_rules import check_tokenizer, panics_are_errors

_SPARE_BYTES = 1 << 30  # for buffers, beyond the size of the weights
_LONGEST_NAME = 200  # of a tensor, on screen
_OFFLINE = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class ModelFolder:
    """An opened folder with a config.json and safetensors."""

    path: Path
    config: PreTrainedConfig
    handles: Mapping[str, Any]
    """The open file of each tensor, by tensor name."""

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The causal model on the meta device: names and shapes."""
        return self._skeleton(AutoModelForCausalLM, self.config)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the names and in the order of the causal model's parameters."""
        return shapes(self.skeleton)

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """The part of ``shapes`` that a ticket covers, without what the architecture freezes."""
        return trained_shapes(self.skeleton)

    @property
    def constants(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the persistent buffers by name; the files contain them like parameters."""
        return {name: tuple(buffer.shape) for name, buffer in constants(self.skeleton).items()}

    def require_names(self, *, exact: bool = True) -> None:
        """Raise UserError unless the files contain the parameters and constants under the model's
        own names and in its shapes, and, with ``exact``, nothing else."""
        known = self.shapes | self.constants
        if missing := sorted(known.keys() - self.handles.keys()):
            raise UserError(f"{self.path} lacks {few(missing)}: it is not a whole causal model")
        if exact and (strange := sorted(self.handles.keys() - known.keys())):
            raise UserError(f"{self.path} has unknown tensors: {few(strange)}")
        for name, shape in known.items():
            if (found := shape_of(self.handles, name)) != shape:
                raise UserError(
                    f"{self.path}: {name} has shape {list(found)}, but {CONFIG_FILE} requires "
                    f"{list(shape)}"
                )

    def load(self, kind: Any = AutoModelForCausalLM, config: Any = None) -> PreTrainedModel:
        """Return the model in fp32 on CPU, as ``kind`` with ``config`` (None: the folder's).

        torch's generator draws a head that the causal model does not have. Raises UserError when
        anything else is missing or left over.
        """
        config = self.config if config is None else config
        causal, wanted = self.skeleton, self._skeleton(kind, config)
        own, known = set(wanted.state_dict()), set(causal.state_dict())
        heads = own - known
        inside = f"{causal.base_model_prefix}."
        if strange := sorted(n for n in own ^ known if n.startswith(inside) and "pooler" not in n):
            raise UserError(
                f"{self.path}: {type(wanted).__name__} is not built on the causal model: "
                f"{few(strange)} would be lost or random"
            )
        self.require_room(wanted, heads)
        try:
            model, info = kind.from_pretrained(
                self.path,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **_OFFLINE,
            )
        except Exception as error:  # noqa: BLE001 - transformers raises anything for a bad file
            raise UserError(f"{self.path} cannot be loaded: {first_line(error)}") from None
        if missing := sorted(set(info["missing_keys"]) - heads):
            raise UserError(f"{self.path} lacks {few(missing)}: it is not a whole causal model")
        lost = known - own  # the output matrix, which has another name in older files
        forms = {tuple(causal.state_dict()[name].shape) for name in lost}
        left = set(info["unexpected_keys"]) - lost
        if strange := sorted(name for name in left if shape_of(self.handles, name) not in forms):
            raise UserError(f"{self.path} has unknown tensors: {few(strange)}")
        loaded: PreTrainedModel = model
        for name, param in wanted.named_parameters():  # transformers 5 loses this while loading
            loaded.get_parameter(name).requires_grad_(param.requires_grad)
        return loaded

    def _skeleton(self, kind: Any, config: Any) -> PreTrainedModel:
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                model: PreTrainedModel = kind.from_config(
                    copy.deepcopy(config), trust_remote_code=False
                )
        except Exception as error:  # noqa: BLE001 - transformers raises anything for a bad config
            raise UserError(
                f"{self.path / CONFIG_FILE} describes no model: {first_line(error)}"
            ) from None
        return model

    def require_room(self, model: nn.Module | None = None, heads: Collection[str] = ()) -> None:
        """Raise UserError if the config describes more than the files contain: ``model`` (None: the
        causal one) without its new ``heads``."""
        model = self.skeleton if model is None else model
        stored = sum(torch.Size(shape_of(self.handles, name)).numel() for name in self.handles)
        params = dict(model.named_parameters())
        needed = sum(param.numel() for name, param in params.items() if name not in heads)
        if needed > stored:
            missing = sorted(params.keys() - set(heads) - self.handles.keys())
            if missing:
                raise UserError(f"{self.path} lacks {few(missing)}: it is not a whole causal model")
            raise UserError(
                f"{self.path}: {CONFIG_FILE} describes {needed:,} parameters, but the files "
                f"contain {stored:,}"
            )
        if sum(buffer.nbytes for buffer in model.buffers()) > 4 * stored + _SPARE_BYTES:
            raise UserError(f"{self.path / CONFIG_FILE} describes buffers larger than the model")


def open_folder(path: Path) -> ModelFolder:
    """Open a causal model. Raises UserError when it is not one or cannot be trusted."""
    config, handles = read_config(path), open_tensors(path)
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(handles):  # building thousands takes a while
        raise UserError(
            f"{path / CONFIG_FILE} describes {layers} layers, but the files contain {len(handles)} "
            "tensors"
        )
    return ModelFolder(path, config, handles)


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a causal model of transformers."""
    folder_rules.check_files(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is not a model: it has no {CONFIG_FILE}. Name the folder of a release"
        )
    values = read_object(path)
    folder_rules.check_config(path, values)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(f"{path}: transformers has no architecture {model_type!r:.80}")
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{path}: model_type={model_type!r} is not a causal language model")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **_OFFLINE)
    except Exception as error:  # noqa: BLE001 - transformers raises anything for a bad config
        raise UserError(f"{path} is not usable: {first_line(error)}") from None
    return config


def open_tensors(folder: Path) -> dict[str, Any]:
    """Return the open safetensors file of each tensor, by tensor name."""
    handles: dict[str, Any] = {}
    for path in folder_rules.weight_files(folder):
        add_tensors(handles, path)
    return handles


def add_tensors(handles: dict[str, Any], path: Path) -> None:
    """Add the tensors of one more file. Raises UserError when it is damaged."""
    try:
        handle = safe_open(path, "pt")
        names = list(handle.keys())
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)})") from None
    except MemoryError as error:
        raise UserError(f"{path} cannot be mapped into memory: {first_line(error)}") from None
    for name in names:
        handles.setdefault(name, handle)


def shape_of(handles: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return tuple(handles[name].get_slice(name).get_shape())


def read_slice(handles: Mapping[str, Any], name: str, start: int, count: int) -> torch.Tensor:
    """Return elements [start, start + count) of a tensor in row-major order, (count,) as stored. It
    reads whole rows, and no more of them than it needs."""
    stored = handles[name].get_slice(name)
    shape = stored.get_shape()
    if not shape:
        whole: torch.Tensor = handles[name].get_tensor(name)
        return whole.view(1)[start:][:count]
    rows, *row = shape
    size = math.prod(row)
    low, high = start // size, min(rows, -(-(start + count) // size))
    part: torch.Tensor = stored[low:high]
    return part.reshape(-1)[start - low * size :][:count]


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model folder. Raises UserError if it has none, or one with code."""
    folder_rules.check_files(folder)
    check_tokenizer(folder)
    try:
        with panics_are_errors():
            tokenizer = AutoTokenizer.from_pretrained(folder, **_OFFLINE)
            tokenizer.encode("a b")  # some fail only here
    except Exception as error:  # noqa: BLE001 - transformers raises anything for a bad folder
        raise UserError(f"{folder} has no readable tokenizer: {first_line(error)}") from None
    return tokenizer


def embeddings(model: Any) -> frozenset[str]:
    """Return the names of the input and output embeddings of ``model``."""
    inside = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    head = model.get_output_embeddings()
    known = {id(weight) for weight in [*inside, *([head.weight] if head is not None else [])]}
    return frozenset(name for name, param in model.named_parameters() if id(param) in known)


def few(names: Iterable[str]) -> str:
    """Return the first three names, with absurdly long ones cut, and the number of the others."""
    found = list(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(shown(name)[:_LONGEST_NAME] for name in found[:3]) + more
