"""A causal model with a new classification head on the last token.

    kind = classifier(folder.config, 2, padding=pad_id(folder.config))
    model = folder.load(kind, folder.config)

If transformers has no such class for an architecture, its generic head is put on the base model.
"""

from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from pmp_ds.errors import UserError
from pmp_ds.model.shrink import shrunk


def pad_id(config: PreTrainedConfig) -> int:
    """Return the token that pads rows: the first end-of-text token. Raises UserError if there is
    none."""
    eos, pad = (getattr(config, name, None) for name in ("eos_token_id", "pad_token_id"))
    found = eos if eos is not None else pad
    first = found[0] if isinstance(found, list) and found else found
    if not isinstance(first, int):
        raise UserError("config.json has no eos_token_id, which is needed to pad rows: add it")
    return first


def classifier(config: PreTrainedConfig, num_outputs: int, padding: int) -> Any:
    """Return the class that builds the classifier of ``config``, after setting ``config`` up for
    ``num_outputs`` and ``padding``. Raises UserError for an architecture that accepts no head."""
    config.num_labels = num_outputs
    config.problem_type = "regression" if num_outputs == 1 else "single_label_classification"
    config.pad_token_id = padding
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        AutoModelForSequenceClassification.register(
            type(config), _generic(type(config)), exist_ok=True
        )
    _require_head(config)
    return AutoModelForSequenceClassification


def _generic(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Return the generic head on the causal model's base class, so that weight names are equal."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    family = next(c for c in causal.__mro__[1:] if issubclass(c, PreTrainedModel))
    name = f"{config_class.__name__.removesuffix('Config')}ForSequenceClassification"
    content = {"config_class": config_class, "base_model_prefix": causal.base_model_prefix}
    return type(name, (GenericForSequenceClassification, family), content)


def _require_head(config: PreTrainedConfig) -> None:
    """Try the head at tiny width. A head of transformers may fail there and still work."""
    kind = AutoModelForSequenceClassification._model_mapping[type(config)]
    with torch.random.fork_rng(devices=[]):
        try:
            model = kind._from_config(shrunk(config)).train()
            _require_outputs(model, 4, config.num_labels)
        except Exception:  # noqa: BLE001 - transformers raises anything here
            if kind.__module__ != __name__:
                return
            reason = "transformers has no such class, and its base model no plain head"
        else:
            try:
                _require_outputs(model, 17, config.num_labels)
                return
            except Exception:  # noqa: BLE001 - transformers raises anything here
                reason = "it does not train on rows of any length"
    raise UserError(
        f"model_type={config.model_type!r} accepts no classification head: {reason}. Fine-tune it "
        "on text: --task lm"
    )


def _require_outputs(model: PreTrainedModel, length: int, num_labels: int) -> None:
    input_ids = torch.arange(1, 2 * length + 1).view(2, length)
    options = {"attention_mask": torch.ones_like(input_ids), "use_cache": False}
    shape = tuple(model(input_ids=input_ids, **options).logits.shape)
    if shape != (2, num_labels):
        raise ValueError(shape)
