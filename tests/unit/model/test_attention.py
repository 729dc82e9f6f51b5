from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from pmp_ds.model.attention import FAMILIES, NAME, plain_attention

TOKENS, VOCAB = 48, 97


def small(family: str, **more: object) -> PreTrainedModel:
    config = CONFIG_MAPPING[family](
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=2 * TOKENS,
        **{"num_key_value_heads": 2, "head_dim": 8} if family not in ("gpt2", "gpt_neox") else {},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **more,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def computed(model: PreTrainedModel, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits and all gradients."""
    model = model.to(dtype).train()
    model.zero_grad()
    tokens = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # dropout
    logits = model(input_ids=tokens, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 0].sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    return [logits, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_it_gives_the_same_bits(family: str, dtype: torch.dtype) -> None:
    before = computed(small(family), dtype)
    model = plain_attention(small(family), TOKENS)
    assert model.config._attn_implementation == NAME
    assert NAME not in model.config.to_json_string()
    for ours, theirs in zip(computed(model, dtype), before, strict=True):
        assert torch.equal(ours, theirs)


def test_short_windows_and_other_families_keep_their_masks() -> None:
    for window, name in ((TOKENS, "sdpa"), (TOKENS + 1, NAME), (None, NAME)):
        model = plain_attention(small("mistral", sliding_window=window), TOKENS)
        assert model.config._attn_implementation == name
    assert plain_attention(small("gemma2"), TOKENS).config._attn_implementation != NAME
    model = small("llama")
    model.set_attn_implementation("eager")
    assert plain_attention(model, TOKENS).config._attn_implementation == "eager"


def test_the_positions_of_a_batch_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    looked: list[torch.Tensor] = []
    real = masking_utils.find_packed_sequence_indices

    def looking(positions: torch.Tensor) -> Any:
        looked.append(positions)
        return real(positions)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looking)
    computed(small("llama"), torch.float32)
    assert looked, "transformers no longer looks: pmp_ds/model/attention.py may go"
    looked.clear()
    computed(plain_attention(small("llama"), TOKENS), torch.float32)
    assert not looked
