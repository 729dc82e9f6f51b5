"""The model that a method of fine-tuning (method.py) trains, and its mask."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pmp_ds.config import MaskConfig
from pmp_ds.data.loader import order_key
from pmp_ds.discover.discover import random_ticket
from pmp_ds.errors import UserError
from pmp_ds.finetune.config import FinetuneConfig
from pmp_ds.finetune.method import METHODS
from pmp_ds.model.classifier import classifier, pad_id
from pmp_ds.model.folder import open_folder
from pmp_ds.model.parameters import parameter_table
from pmp_ds.ticket.fit import fitted
from pmp_ds.ticket.keys import identities, read_passphrase
from pmp_ds.ticket.mask import ParamMask, full_bits, pack
from pmp_ds.ticket.ticket import Ticket
from pmp_ds.ticket.vault import any_ticket


def open_ticket(config: FinetuneConfig) -> Ticket | None:
    """Return the ticket if the method needs one. Raises UserError when it cannot be opened or
    belongs to a model with other parameters."""
    if not METHODS[config.method].needs_ticket:
        return None
    assert config.ticket is not None
    if config.identity is not None and config.passphrase_file is not None:
        raise UserError("--identity and --passphrase_file both open a file: pass only one")
    by: Any = None
    if config.identity is not None:
        by = identities(Path(config.identity))
    elif config.passphrase_file is not None:
        by = read_passphrase(Path(config.passphrase_file), confirm=False)
    ticket = any_ticket(Path(config.ticket), by)
    shapes = open_folder(Path(config.model)).trained
    return replace(ticket, mask=fitted(ticket.mask, shapes, f"--model {config.model}"))


def load_model(config: FinetuneConfig, num_labels: int | None) -> Any:
    """Return the model that a method trains, fp32 on CPU, the same at every call: released weights
    (fresh ones with ``scratch``), a new head of ``num_labels`` outputs (None: no head, next-token
    prediction), and the method's adapters, if any."""
    model = _load(config, num_labels)
    return METHODS[config.method].adapt(model, config, num_labels is not None)


def mask_of(
    config: FinetuneConfig, ticket: Ticket | None, model: Any
) -> tuple[ParamMask | None, str | None]:
    """Return the mask on ``model`` and its id, or None for all trainable ones. Collective."""
    return METHODS[config.method].kept(config, ticket, model) or (None, None)


def _load(config: FinetuneConfig, num_labels: int | None) -> Any:
    """Return the released weights, or fresh ones with ``scratch``; the seed draws a head."""
    folder = open_folder(Path(config.model))
    hf_config = folder.config
    hf_config.use_cache = False
    kind: Any = AutoModelForCausalLM
    if num_labels is not None:
        kind = classifier(hf_config, num_labels, pad_id(hf_config))
    torch.manual_seed(config.seed)
    if config.scratch:
        folder.require_room()
        return kind.from_config(hf_config, dtype=torch.float32)
    return folder.load(kind, hf_config)


def with_adapters(model: Any, config: FinetuneConfig, has_head: bool) -> Any:
    """Return ``model`` with adapters of `peft`. Raises UserError for targets it does not have."""
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(config.seed)
    lora = config.lora
    targets: Any = list(lora.targets) if lora.targets != ("all-linear",) else "all-linear"
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type=TaskType.SEQ_CLS if has_head else TaskType.CAUSAL_LM,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m)}
        raise UserError(
            f"--lora.targets {' '.join(lora.targets)}: {str(error).partition('.')[0]}; the linear "
            f"modules of this model are {', '.join(sorted(linear))}"
        ) from None


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def random_mask(config: FinetuneConfig, model: Any) -> Ticket:
    """Draw a uniform mask over the backbone, including norms and biases, as in a ticket."""
    known = open_folder(Path(config.model)).trained
    table = [row for row in parameter_table(model) if row.name in known]
    backbone = [replace(row, constant=len(row.shape) < 2) for row in table]
    key = order_key("random mask of fine-tuning", config.seed)
    return random_ticket(key, MaskConfig(source="random", density=config.density), tuple(backbone))


def with_head(mask: ParamMask, model: Any, *, inverted: bool = False) -> ParamMask:
    """Return ``mask`` (or its complement) on the parameters of ``model``. A head, which the mask
    does not cover, is trained whole. Parameters that the model lacks, such as a language model's
    output matrix, are left out."""
    bits, table = {}, parameter_table(model)
    for row in table:
        if row.name not in mask.shapes:
            bits[row.name] = full_bits(row.numel)
        elif mask.shapes[row.name] != row.shape:
            raise UserError(f"the ticket belongs to another model: {row.name} differs")
        elif inverted:
            bits[row.name] = pack(~mask.full(row.name))
        else:
            bits[row.name] = mask.bits[row.name]
    return ParamMask(bits=bits, shapes={row.name: row.shape for row in table})
