"""Classification examples as rows of numbers, and how a causal model reads them.

A row is (max_length + 2,) int64: the tokens, padded on the right; how many they are; the label (of
regression the bits of an fp32 number). So a task is read by the same loader as packed text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

Indices = npt.NDArray[np.integer]


class Rows:
    """Encoded examples; what ``data.loader.BlockLoader`` reads."""

    def __init__(
        self,
        texts: Sequence[tuple[str, ...]],  # one or two texts per example
        labels: npt.NDArray[Any],  # (n,) int64, or float32 for regression
        tokenizer: PreTrainedTokenizerBase,
        *,
        bos_id: int | None,
        eos_id: int,
        max_length: int,
    ) -> None:
        """Special tokens are added here alone: ``bos_id`` (if any) at the start, ``eos_id`` between
        the texts of a pair. A text that spells one is text."""
        start = [] if bos_id is None else [bos_id]
        self._rows = np.full((len(texts), max_length + 2), eos_id, dtype=np.int64)
        for number, parts in enumerate(_encode(tokenizer, texts)):
            ids = start + _join(parts, eos_id, max_length - len(start))
            self._rows[number, : len(ids)] = ids
            self._rows[number, -2] = len(ids)
        regression = np.issubdtype(labels.dtype, np.floating)
        self._rows[:, -1] = labels.astype(np.float32).view(np.int32) if regression else labels

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, indices: Indices) -> npt.NDArray[np.int64]:
        return self._rows[indices]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, (n,)."""
        return self._rows[:, -2]


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]]
) -> list[list[list[int]]]:
    """Token ids of each text of each example, at least one: an empty text is a space."""
    flat = [text or " " for parts in texts for text in parts]
    encoded = tokenizer(flat, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = iter(encoded)
    return [[next(ids) for _ in parts] for parts in texts]


def _join(parts: list[list[int]], separator: int, max_length: int) -> list[int]:
    """Texts with a separator between them; while that is too long, the longer is cut at its end."""
    room = max_length - (len(parts) - 1)
    lengths = [len(part) for part in parts]
    while sum(lengths) > room:
        longest = int(np.argmax(lengths))
        lengths[longest] -= 1
    joined: list[int] = []
    for number, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        joined += [separator] * (number > 0) + part[:length]
    return joined


class Classification:
    """The objective on ``Rows``: cross-entropy in nats, or squared error for one output."""

    def logits(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        """(B, num_labels), read at the last token of each example."""
        lengths = batch[:, -2]
        tokens = batch[:, : int(lengths.max())]
        attended = torch.arange(tokens.shape[1], device=batch.device) < lengths[:, None]
        # `transformers` finds the last token by config.pad_token_id, which is the padding's.
        options = {"attention_mask": attended.long(), "use_cache": False}
        logits: torch.Tensor = model(input_ids=tokens, **options).logits
        return logits

    def losses(self, logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        if logits.shape[1] == 1:
            values = batch[:, -1].to(torch.int32).view(torch.float32)
            return (logits[:, 0].float() - values) ** 2
        return torch.nn.functional.cross_entropy(logits.float(), batch[:, -1], reduction="none")
