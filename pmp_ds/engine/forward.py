"""How a model computes on its device: which activations are recomputed, which layers compiled, and
how wide the last projection is."""

import functools
import importlib.util
from typing import Any

import torch
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from pmp_ds.config import TrainConfig
from pmp_ds.errors import UserError

# What is expensive to compute: `selective` keeps these results and recomputes the rest.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def recompute_activations(model: PreTrainedModel, config: TrainConfig) -> None:
    """Apply ``train.activation_checkpointing`` to the repeated layers of ``model``.

    Raises UserError for a model that transformers cannot checkpoint.
    """
    kind = config.activation_checkpointing
    if kind == "none":
        return
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"train.activation_checkpointing={kind} does not work with {type(model).__name__}: "
            "set it to none"
        )
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": _draws(model)}
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator in _KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _draws(model: torch.nn.Module) -> bool:
    """Return whether a forward pass draws random numbers: recomputing has to draw them again."""
    config: Any = model.config
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    rates += [v for name, v in config.to_dict().items() if name.endswith(("dropout", "pdrop"))]
    return any(isinstance(rate, float) and rate > 0.0 for rate in rates)


_ALIGNED, _TILE = 8, 64  # rows of logits in 16 bits: a GPU's loads of 16 bytes, its tiles


class _PaddedHead(torch.nn.Linear):
    """A last projection that computes with rows of zeros at the end, and returns the logits of its
    own rows, (..., V)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = self.weight.shape[0]
        more = -rows % _TILE
        weight = pad(self.weight, (0, 0, 0, more))
        bias = None if self.bias is None else pad(self.bias, (0, more))
        return linear(hidden, weight, bias)[..., :rows]


def pad_vocabulary(model: PreTrainedModel, device: torch.device) -> None:
    """Make a GPU compute the logits of a multiple of 64 tokens if their number is none of 8, when
    matrix products take a slower kernel. The parameters, and so d, k, ticket, checkpoints and
    release, stay as they are, and no padded logit leaves the projection."""
    head = model.get_output_embeddings()
    if device.type == "cuda" and type(head) is torch.nn.Linear and head.weight.shape[0] % _ALIGNED:
        head.__class__ = _PaddedHead


def repeated_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that a transformer repeats: the longest list of modules of one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    alike = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    return max(alike, key=len, default=[])


def compile_layers(
    model: torch.nn.Module, config: TrainConfig, device: torch.device, stage: int
) -> str | None:
    """Apply ``train.compile``: each repeated layer by itself, which compiles once for all of them.

    Returns a line that says why not, where the setting asks for it. A layer that the compiler
    cannot handle runs as it is.
    """
    wanted = config.compile == "layers" or (config.compile == "auto" and device.type == "cuda")
    if not wanted:
        return None
    if stage == 3:
        return "ZeRO 3 gathers parameters inside the layers, so they are not compiled"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton, so the layers are not compiled"
    torch._dynamo.config.suppress_errors = True
    for layer in repeated_layers(model):
        layer.compile(dynamic=False)
    return None
