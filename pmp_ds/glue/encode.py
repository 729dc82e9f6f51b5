"""Encode the texts of a row, the same for every classifier. Imports without torch."""

from collections.abc import Sequence
from typing import Any

from pmp_ds.glue.read import Rows


def encode(tokenizer: Any, rows: Rows, max_length: int) -> list[list[int]]:
    """Return at most ``max_length`` ids per row, without padding: the texts, a line end between
    two, and the special tokens that ``tokenizer`` adds. Of two texts the longer is cut first.

    ``tokenizer`` is a Hugging Face one. A special token spelled in a text is encoded as text. A row
    without any token becomes its end-of-text token.
    """
    columns: Sequence[list[str]] = [list(column) for column in zip(*rows.texts, strict=True)]
    columns = [columns[0], *([f"\n{text}" for text in column] for column in columns[1:])]
    ids = tokenizer(
        *columns, truncation="longest_first", max_length=max_length, split_special_tokens=True
    )["input_ids"]
    return [row or [tokenizer.eos_token_id] for row in ids]
