"""Causal attention that does not make the host wait.

Without an attention mask, transformers 5.23 looks at the positions of every batch for more than one
document, and the host waits for the answer (masking_utils._preprocess_mask_arguments). It looks at
nothing for an attention function that it knows no masks for: ``plain_attention`` registers its own
function for scaled dot products under another name, which gives the same bits.
"""

from typing import Any

from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "pmp_ds_causal"
FAMILIES = frozenset(
    ("gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3")
)
"""Architectures whose masks say nothing but `causal` and, in some, `sliding`: measured in
tests/unit/model/test_attention.py."""

AttentionInterface.register(NAME, sdpa_attention_forward)


def plain_attention(model: PreTrainedModel, tokens: int) -> PreTrainedModel:
    """Return ``model``, set up to skip masks for batches of ``tokens`` tokens in a row that have no
    padding and one document per row; left as it is where a layer needs more than a causal mask."""
    if _is_causal(model.config, tokens):
        model.set_attn_implementation(NAME)
    return model


def _is_causal(config: Any, tokens: int) -> bool:
    if config.model_type not in FAMILIES or config._attn_implementation != "sdpa":
        return False
    window = getattr(config, "sliding_window", None)
    if window is not None and window <= tokens:
        return False
    layers = set(getattr(config, "layer_types", None) or ())
    return layers <= {"full_attention", "sliding_attention"}
