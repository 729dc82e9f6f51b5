"""Predict the last word of a text, as LAMBADA does, for any local file.

    {"text": "... and she gave the keys to John"}       one JSON line each, or plain lines (.txt)

The last word follows the last white space. It counts as known if each of its tokens is the most
likely one after the text before it, so that greedy continuation would write it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pmp_ds.errors import UserError
from pmp_ds.evaluate.zero_shot import padded
from pmp_ds.foreign import ForeignError, parse_object, read_text

_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Example:
    """The ids of a text; the last word's start at ``start``."""

    ids: list[int]
    start: int


def read_texts(path: Path) -> list[str]:
    """Return the texts. Raises UserError that names a line without `text`, or an empty file."""
    try:
        lines = read_text(path, _MOST_BYTES).splitlines()
    except ForeignError as error:
        raise UserError(f"--text {error}") from None
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text = _field(line, f"--text {path}, line {number}") if path.suffix != ".txt" else line
        if len(text.split()) < 2:
            raise UserError(
                f"--text {path}, line {number}: {text.strip()[:60]!r} has fewer than two words; "
                "the last one must follow others"
            )
        texts.append(text.strip())
    if not texts:
        raise UserError(f"--text {path} is empty: it needs a text on each line")
    return texts


def _field(line: str, where: str) -> str:
    try:
        text = parse_object(line).get("text")
    except ValueError:
        text = None
    if not isinstance(text, str):
        raise UserError(f'{where} is not {{"text": "..."}}: fix it, or name a .txt of plain lines')
    return text


def encode(tokenizer: Any, text: str, longest: int) -> Example:
    """Return the last ``longest`` ids of ``text``. The last word's are those in which it differs
    from the text without it. A special token spelled in the text is encoded as text."""
    ids, before = (
        tokenizer.encode(t, split_special_tokens=True) for t in (text, text.rsplit(maxsplit=1)[0])
    )
    start = 0
    while start < min(len(ids), len(before)) and ids[start] == before[start]:
        start += 1
    ids = ids[: len(ids) - _num_appended(tokenizer)]
    cut = max(0, len(ids) - longest)
    return Example(ids[cut:], max(1, start - cut))


def _num_appended(tokenizer: Any) -> int:
    """Return the number of special tokens that the tokenizer appends by default."""
    ids: list[int] = tokenizer.encode("a")
    plain: list[int] = tokenizer.encode("a", add_special_tokens=False)
    starts = [i for i in range(len(ids)) if ids[i : i + len(plain)] == plain]
    return len(ids) - starts[0] - len(plain) if starts else 0


@torch.inference_mode()
def last_word(
    model: PreTrainedModel,
    examples: Sequence[Example],
    batch_size: int,
    tick: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """Return `accuracy`, `perplexity` (exp of a last word's mean -log p) and `texts`."""
    known, nats = 0, 0.0
    ordered = sorted(examples, key=lambda example: len(example.ids))  # reduces padding
    for low in range(0, len(ordered), batch_size):
        batch = ordered[low : low + batch_size]
        for example, logits in zip(batch, _logits(model, batch), strict=True):
            word = torch.tensor(example.ids[example.start :], device=logits.device)
            # The logits at a position predict the next token.
            before = logits[example.start - 1 : len(example.ids) - 1].float()
            known += bool((before.argmax(-1) == word).all())
            nats += float(torch.nn.functional.cross_entropy(before, word, reduction="sum"))
        tick(len(batch))
    return {
        "accuracy": known / len(ordered),
        "perplexity": math.exp(min(nats / len(ordered), 700.0)),
        "texts": float(len(ordered)),
    }


def _logits(model: PreTrainedModel, batch: Sequence[Example]) -> torch.Tensor:
    """Return (B, T, V) logits, padded on the right, where causal attention does not look."""
    ids, attention_mask = padded([example.ids for example in batch], 0)
    logits: torch.Tensor = model(
        input_ids=ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        use_cache=False,
    ).logits
    return logits
