"""Recomputed activations, the loss in blocks, and which layers are compiled."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from pmp_ds.config import TrainConfig
from pmp_ds.engine.figures import flops_per_token, peak_flops
from pmp_ds.engine.forward import (
    compile_layers,
    pad_vocabulary,
    recompute_activations,
    repeated_layers,
)
from pmp_ds.engine.objective import in_blocks
from pmp_ds.errors import UserError
from pmp_ds.model.next_token import token_losses
from pmp_ds.model.parameters import digest, parameter_table
from tests.helpers import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def step(kind: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss and gradients of one batch, and the bytes that were kept for the backward pass."""
    model = tiny.model(tiny.LLAMA)
    model.train()
    recompute_activations(model, TrainConfig(activation_checkpointing=kind))
    batch, kept = tiny.batch(1, 4), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=batch, use_cache=False).logits
    loss = token_losses(logits, batch).mean()
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputing_changes_no_bit_and_keeps_less(kind):
    loss, gradients, kept = step("none")
    again, others, fewer = step(kind)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert fewer < 0.9 * kept


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm")
        return func(*args, **(kwargs or {}))


def test_selective_recomputes_no_matrix_product():
    counts = {}
    for kind in ("none", "selective", "full"):
        with Products() as products:
            step(kind)
        counts[kind] = products.count
    assert counts["none"] == counts["selective"] < counts["full"]


def test_a_model_that_cannot_recompute(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    config = TrainConfig(activation_checkpointing="full")
    with pytest.raises(UserError, match="activation_checkpointing=full does not work with Llama"):
        recompute_activations(tiny.model(tiny.LLAMA), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_blocks(dtype):
    """Within a few last bits of the loss from fp32 logits, which it never holds whole."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 17, 1000, generator=generator).to(dtype).requires_grad_()
    whole = logits.detach().clone().requires_grad_()
    tokens = torch.randint(0, 1000, (3, 17), generator=generator)
    weights = torch.rand(3, 16, generator=generator)
    losses, expected = in_blocks(logits, tokens), token_losses(whole, tokens)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=2e-6)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, whole.grad, rtol=1e-5, atol=1e-7)


class Sizes(TorchDispatchMode):
    """Collects the sizes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.found |= {n for tensor in args for n in tensor.shape}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [tiny.LLAMA, tiny.LLAMA_TIED], ids=["untied", "tied"])
def test_a_padded_vocabulary(kind):
    """300 tokens: a GPU computes with 320, and nothing else of the model knows of it."""
    batch, found = tiny.batch(1, 4), []
    for device in (CPU, CUDA):
        model = tiny.model(kind)
        order = digest(parameter_table(model))
        pad_vocabulary(model, device)
        assert digest(parameter_table(model)) == order
        with Sizes() as sizes:
            logits = model(input_ids=batch, use_cache=False).logits
            assert logits.shape[-1] == tiny.VOCAB
            in_blocks(logits, batch).mean().backward()
        assert sizes.found & {tiny.VOCAB, 320} == {tiny.VOCAB if device == CPU else 320}
        gradients = {name: param.grad for name, param in model.named_parameters()}
        assert list(model.state_dict()) == list(tiny.model(kind).state_dict())
        found.append((logits.detach(), gradients))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_padded_vocabulary_with_biases():
    model = tiny.model(tiny.LLAMA)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(tiny.VOCAB) / 100)
    expected = model(input_ids=tiny.batch(1, 2), use_cache=False).logits
    pad_vocabulary(model, CUDA)
    with Sizes() as sizes:
        found = model(input_ids=tiny.batch(1, 2), use_cache=False).logits
    assert {320} <= sizes.found
    torch.testing.assert_close(found, expected)


def test_an_aligned_vocabulary_is_left_alone():
    """Padding costs copies of the logits; rows of 16 bytes are what the fast kernels need."""
    model = tiny.model(tiny.LLAMA)
    model.resize_token_embeddings(304)
    pad_vocabulary(model, CUDA)
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("kind", [tiny.LLAMA, tiny.GPT2], ids=["llama", "gpt2"])
def test_the_layers_that_repeat(kind):
    layers = repeated_layers(tiny.model(kind))
    assert len(layers) == 2
    assert {type(layer).__name__ for layer in layers} <= {"LlamaDecoderLayer", "GPT2Block"}


def test_what_is_compiled():
    model = tiny.model(tiny.LLAMA)
    assert compile_layers(model, TrainConfig(), CPU, 1) is None
    assert all(layer._compiled_call_impl is None for layer in repeated_layers(model))
    config = TrainConfig(compile="layers")
    assert "ZeRO 3" in (compile_layers(model, config, CPU, 3) or "")
    assert all(layer._compiled_call_impl is None for layer in repeated_layers(model))
    assert compile_layers(model, config, CPU, 2) is None
    assert all(layer._compiled_call_impl is not None for layer in repeated_layers(model))


@pytest.mark.nightly
@pytest.mark.processes
def test_compiled_layers_compute_the_same():
    """By inductor's C++ on CPU: losses within 1e-5 nats of the layers as they are."""
    batch = tiny.batch(1, 4)
    losses = []
    for setting in ("none", "layers"):
        model = tiny.model(tiny.LLAMA)
        compile_layers(model, TrainConfig(compile=setting), CPU, 1)
        logits = model(input_ids=batch, use_cache=False).logits
        losses.append(token_losses(logits, batch).mean())
    assert losses[0].allclose(losses[1], atol=1e-5, rtol=0.0)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_flops_by_hand():
    """6 * 1,000 + 12 * 2 layers * width 8 * 16 tokens."""
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)
    assert flops_per_token(config, 1000, 16) == 6000 + 12 * 2 * 8 * 16


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("X", None)]
)
def test_peak_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert peak_flops(cuda, torch.bfloat16) == peak
    assert peak_flops(cuda, torch.float32) is None
    assert peak_flops(CPU, torch.bfloat16) is None


@pytest.mark.parametrize("words", ["10", "3:2", "0:4", "a:b", "1:2:3"])
def test_odd_updates_to_profile(words):
    with pytest.raises(UserError, match=r"train\.profile='.*' must be FIRST:LAST"):
        TrainConfig(profile=words)
