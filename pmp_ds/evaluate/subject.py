"""The model that is measured: a Hugging Face folder, loaded once, in fp32."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pmp_ds.data.arrow_store import Store
from pmp_ds.errors import UserError, quoted
from pmp_ds.model.build import context_length
from pmp_ds.model.folder import embeddings, few, open_folder, open_tokenizer, shape_of
from pmp_ds.model.parameters import trained_shapes
from pmp_ds.prepare.tokenizer import load_tokenizer
from pmp_ds.results import model_digest
from pmp_ds.ticket.fit import fitted
from pmp_ds.ticket.mask import ParamMask

Read = Callable[[str], torch.Tensor]
"""From a parameter's name to its values on disk, as stored."""


@dataclass(frozen=True)
class Subject:
    """A causal model, ready to be run."""

    folder: Path
    model: PreTrainedModel
    """In fp32 and evaluation mode; its weights are the folder's whenever no measurement runs."""

    digest: str
    """`results.model_digest` of the folder."""

    @classmethod
    def open(cls, folder: Path, device: str = "cpu") -> "Subject":
        """Raises UserError for a folder that is no causal model, is damaged or lacks weights."""
        model: Any = open_folder(folder).load().eval()
        return cls(folder, model.to(device), model_digest(folder))

    @cached_property
    def tokenizer(self) -> Any:
        """Raises UserError when the folder has none."""
        if not has_tokenizer(self.folder):
            raise UserError(f"{self.folder} has no tokenizer.json: it is needed to read text")
        return open_tokenizer(self.folder)

    @property
    def has_tokenizer(self) -> bool:
        return has_tokenizer(self.folder)

    @property
    def embeddings(self) -> frozenset[str]:
        """Names of the input and output embeddings."""
        return embeddings(self.model)

    @property
    def max_positions(self) -> int:
        """Most tokens that the model reads at once."""
        return context_length(self.model.config)

    def reader(self) -> Read:
        """Its parameters from disk. Raises UserError when they have other names there."""
        return read_parameters(self.folder, self.model)

    def require_vocabulary(self, store: Store) -> None:
        """UserError unless the ids in ``store`` are this model's: the same tokenizer, or, in a
        folder without one, no larger vocabulary."""
        rows = int(self.model.config.vocab_size)
        if store.vocab_size > rows:
            raise UserError(
                f"--store {store.folder} has a vocabulary of {store.vocab_size} ids, the model "
                f"{self.folder} one of {rows}: tokenize the text with the model's tokenizer"
            )
        if store.block_size > self.max_positions:
            raise UserError(
                f"--store {store.folder} has blocks of {store.block_size} tokens, the model "
                f"{self.folder} reads {self.max_positions} at once: prepare shorter blocks"
            )
        if not (has_tokenizer(self.folder) and has_tokenizer(store.tokenizer_dir)):
            return
        own = load_tokenizer(str(self.folder)).fingerprint
        if (other := load_tokenizer(str(store.tokenizer_dir)).fingerprint) != own:
            raise UserError(
                f"--store {store.folder} was tokenized with another tokenizer ({other[:12]}) than "
                f"the model's ({own[:12]}): prepare it with --tokenizer {quoted(self.folder)}"
            )


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def read_parameters(folder: Path, model: nn.Module) -> Read:
    """The parameters of ``model`` in another or the same model folder, by name. Raises UserError
    when one is missing or of another shape."""
    handles = open_folder(folder).handles
    known = set(model.state_dict())
    if strange := sorted(handles.keys() - known):
        raise UserError(
            f"{folder} has {few(strange)}, which this model does not have: name a folder with "
            "whole weights of this very model, without a new head"
        )
    for name, param in model.named_parameters():
        if name not in handles:
            raise UserError(
                f"{folder} lacks {name}: name a folder with whole weights of this very model, an "
                "adapter merged"
            )
        if (found := shape_of(handles, name)) != tuple(param.shape):
            raise UserError(
                f"{folder}: {name} has shape {list(found)}, the model's is {list(param.shape)}"
            )
    return lambda name: handles[name].get_tensor(name)


def mask_on(mask: ParamMask, model: nn.Module, where: Path) -> ParamMask:
    """``mask`` on the trained parameters of ``model``, which is at ``where``. Raises UserError when
    it is another model's, or of density 0 or 1."""
    found = fitted(mask, trained_shapes(model), where)
    if not 0 < found.num_kept < found.num_params:
        raise UserError("the ticket keeps all parameters, or none: there is nothing to compare")
    return found
