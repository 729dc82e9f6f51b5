"""Mean next-token loss on the blocks of a packed store."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pmp_ds.data.arrow_store import Store
from pmp_ds.model import next_token

Tick = Callable[[int], None]
"""Called with the number of blocks done."""


def held_out(store: Store, split: str, blocks: int) -> torch.Tensor:
    """Return ``blocks`` blocks, or all if there are fewer, evenly spread over the split, (n,
    block_size) int64."""
    stored = store.split(split)
    count = min(blocks, len(stored))
    indices = np.arange(count) * len(stored) // count
    return torch.from_numpy(stored.gather(indices).astype(np.int64))


@torch.inference_mode()
def mean_loss(
    model: PreTrainedModel,
    blocks: torch.Tensor,  # (n, T) int64
    batch_size: int,
    tick: Tick = lambda count: None,
) -> float:
    """Return nats per predicted token; the first token of each block is not predicted."""
    total = 0.0
    for batch in blocks.split(batch_size):
        total += float(token_losses(model, batch).sum(dtype=torch.float64))
        tick(len(batch))
    return total / (blocks.shape[0] * (blocks.shape[1] - 1))


def token_losses(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Return -log p of each token except the first: (B, T) int64 to (B, T - 1) fp32."""
    batch = batch.to(model.device)
    return next_token.token_losses(model(input_ids=batch, use_cache=False).logits, batch)


def perplexity(
    model: PreTrainedModel,
    blocks: torch.Tensor,
    batch_size: int,
    tokenizer: Any = None,
    tick: Tick = lambda count: None,
) -> dict[str, float]:
    """Return `loss` (nats per token), `perplexity`, predicted `tokens`, and with a tokenizer
    `bits_per_byte` of the decoded text, in which special tokens have no bytes."""
    loss = mean_loss(model, blocks, batch_size, tick)
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(tokens)}
    if tokenizer is not None:
        num_bytes = _text_bytes(tokenizer, blocks) - _text_bytes(tokenizer, blocks[:, :1])
        values |= {"bits_per_byte": loss * tokens / math.log(2) / num_bytes}
    return values


def _text_bytes(tokenizer: Any, blocks: torch.Tensor) -> int:
    texts = tokenizer.batch_decode(
        blocks.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return sum(len(text.encode()) for text in texts)
