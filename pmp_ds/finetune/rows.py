"""Classification examples as rows of numbers, and how a causal model reads them.

A row is (max_length + 2,) int64: the tokens, padded on the right; their number; the label (for
regression, the bits of an fp32 number). So the loader of packed text also reads tasks.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from pmp_ds.glue.encode import encode
from pmp_ds.glue.read import Rows

Indices = npt.NDArray[np.integer]


class EncodedRows:
    """Encoded examples, as read by ``data.loader.BlockLoader``."""

    def __init__(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, pad_id: int
    ) -> None:
        self._rows = np.full((len(rows), max_length + 2), pad_id, dtype=np.int64)
        for number, ids in enumerate(encode(tokenizer, rows, max_length)):
            self._rows[number, : len(ids)] = ids
            self._rows[number, -2] = len(ids)
        labels = rows.labels
        if np.issubdtype(labels.dtype, np.floating):
            labels = labels.astype(np.float32).view(np.int32)
        self._rows[:, -1] = labels

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, indices: Indices) -> npt.NDArray[np.int64]:
        return self._rows[indices]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each example, (n,)."""
        return self._rows[:, -2]


class Classification:
    """The objective on ``EncodedRows``: cross-entropy in nats, or squared error for one output."""

    def logits(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        """Return the outputs at the last token of each example, (B, num_labels)."""
        lengths = batch[:, -2]
        tokens = batch[:, : int(lengths.max())]
        attended = torch.arange(tokens.shape[1], device=batch.device) < lengths[:, None]
        # `transformers` finds the last token by config.pad_token_id, the id of the padding.
        options = {"attention_mask": attended.long(), "use_cache": False}
        logits: torch.Tensor = model(input_ids=tokens, **options).logits
        return logits

    def losses(self, logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        if logits.shape[1] == 1:
            values = batch[:, -1].to(torch.int32).view(torch.float32)
            return (logits[:, 0].float() - values) ** 2
        return torch.nn.functional.cross_entropy(logits.float(), batch[:, -1], reduction="none")
