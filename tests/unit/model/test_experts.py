"""Experts of widths that torch's grouped matrix product refuses are computed by transformers' plain
implementation, others as before, to the bit."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from pmp_ds.model.experts import PLAIN, needs_plain, settle_experts
from tests.helpers.odd_models import GPT_OSS, LLAMA, MIXTRAL, odd_config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFUSED = "strides should be multiple of 16 bytes"


@pytest.fixture
def theirs() -> Any:
    """The name of transformers' grouped product, untouched."""
    ExpertsInterface.register("theirs", grouped_mm_experts_forward)
    yield "theirs"
    del ExpertsInterface._global_mapping["theirs"]


def built(config: PreTrainedConfig, implementation: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    config._experts_implementation = implementation
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def computed(model: PreTrainedModel, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits and all gradients."""
    model = model.to(dtype).train()
    tokens = torch.arange(32).view(2, 16) * 7 % model.config.vocab_size
    logits = model(input_ids=tokens, use_cache=False).logits
    logits.float().square().mean().backward()
    return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [GPT_OSS, MIXTRAL])
def test_odd_widths_take_the_plain_way(theirs: str, kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=REFUSED):
        computed(built(odd_config(kind), theirs), dtype)
    model = built(odd_config(kind))
    assert needs_plain(model)
    assert equal(computed(model, dtype), computed(built(odd_config(kind), PLAIN), dtype))


@pytest.mark.parametrize(("hidden", "inner"), [(8, 12), (12, 8), (16, 7)])
def test_one_odd_width_is_enough(theirs: str, hidden: int, inner: int) -> None:
    config = odd_config(MIXTRAL, hidden_size=hidden, intermediate_size=inner)
    with pytest.raises(RuntimeError, match=REFUSED):
        computed(built(config, theirs), torch.bfloat16)
    model = built(config)
    assert needs_plain(model)
    computed(model, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [GPT_OSS, MIXTRAL])
def test_other_widths_keep_their_bits(theirs: str, kind: str, dtype: torch.dtype) -> None:
    config = odd_config(kind, hidden_size=16, intermediate_size=24)
    model = built(config)
    assert not needs_plain(model)
    assert settle_experts(model, gathered=False) is None
    ours = computed(model, dtype)
    assert equal(ours, computed(built(config, theirs), dtype))
    assert not equal(ours, computed(built(config, PLAIN), dtype))


def test_the_user_is_told() -> None:
    with torch.device("meta"):
        model = built(odd_config(GPT_OSS))
    found = settle_experts(model, gathered=True)
    assert found is not None
    assert "one after the other, which is slower: their widths are not all multiples of 8" in found
    assert settle_experts(built(odd_config(LLAMA)), gathered=True) is None


class OnGpu(nn.Parameter):
    """A parameter in host memory that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(("offset", "gathered"), [(0, False), (1, False), (1, True)])
def test_experts_that_begin_elsewhere_on_a_gpu(offset: int, gathered: bool) -> None:
    """As in the flat buffers of ZeRO 1 and 2, behind a tensor of an odd size."""
    model = built(odd_config(MIXTRAL, hidden_size=16, intermediate_size=24))
    experts = next(module for module in model.modules() if hasattr(module, "is_transposed"))
    flat = torch.zeros(offset + experts.down_proj.numel())
    placed = flat[offset:].view_as(experts.down_proj).copy_(experts.down_proj.detach())
    experts._parameters["down_proj"] = OnGpu(placed)
    found = settle_experts(model, gathered=gathered)
    plain = offset == 1 and not gathered
    assert model.config._experts_implementation == (PLAIN if plain else "grouped_mm")
    assert (found or "").endswith("they do not begin at multiples of 16 bytes" if plain else "")
    assert (found is not None) is plain
