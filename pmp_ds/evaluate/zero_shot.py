"""GLUE before any fine-tuning: by the likelihood of answers in words, and with an untrained
classification head (the paper's "Base" rows).

Both return outputs for ``pmp_ds.glue.metrics.score``.
"""

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from pmp_ds.errors import require
from pmp_ds.glue.encode import encode
from pmp_ds.glue.read import Rows
from pmp_ds.glue.tasks import Task
from pmp_ds.model.build import context_length
from pmp_ds.model.classifier import classifier
from pmp_ds.model.folder import open_folder, open_tokenizer
from pmp_ds.progress import Progress


@torch.no_grad()
def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Rows,
    batch_size: int = 32,
    max_length: int = 256,
    bar: Progress | None = None,
) -> np.ndarray:
    """Return log p(answer | prompt) in nats, summed over the answer's tokens, (n, classes) float32;
    for STS-B (n,), the mean of the digits under the distribution of these scores.

    ``model`` is causal, on any device, in its loaded precision, and is left in evaluation mode. A
    forward pass takes ``batch_size`` rows with all answers. Prompts are cut at their beginning so
    that prompt and answer fit in ``max_length`` tokens and the model's positions. ``bar`` counts
    rows.
    """
    model.eval()
    max_length = _longest(model, max_length)
    answers = len(task.answers)
    sequences = [_answered(tokenizer, task, texts, max_length) for texts in rows.texts]
    scores = np.zeros((len(rows), answers), np.float32)
    for batch in _batches([len(row[0][0]) for row in sequences], batch_size):
        flat = [sequence for i in batch for sequence in sequences[i]]
        found = _log_likelihoods(model, flat, tokenizer.eos_token_id)
        scores[batch] = found.view(len(batch), answers).cpu().numpy()
        if bar is not None:
            bar.update(len(batch))
    if not task.is_regression:
        return scores
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected: np.ndarray = odds @ np.arange(answers, dtype=np.float32) / odds.sum(axis=1)
    return expected


@torch.no_grad()
def untrained_head(
    folder: Path,
    task: Task,
    rows: Rows,
    seed: int,
    batch_size: int = 32,
    max_length: int = 256,
    device: str = "cpu",
    bar: Progress | None = None,
) -> np.ndarray:
    """Return the outputs, (n, classes) float32 or (n,) for STS-B, of the model in ``folder`` under
    a linear head on the last token, drawn by ``seed`` alone, in fp32. ``bar`` counts rows.

    Raises UserError when ``folder`` contains no model and tokenizer.
    """
    tokenizer = open_tokenizer(folder)
    model: Any = _with_head(folder, task, seed, tokenizer.eos_token_id)
    model.to(device)
    sequences = encode(tokenizer, rows, _longest(model, max_length))
    outputs = np.zeros((len(rows), task.num_outputs), np.float32)
    for batch in _batches([len(sequence) for sequence in sequences], batch_size):
        input_ids, attention_mask = padded([sequences[i] for i in batch], tokenizer.eos_token_id)
        logits = model(input_ids.to(device), attention_mask=attention_mask.to(device)).logits
        outputs[batch] = logits.cpu().numpy()
        if bar is not None:
            bar.update(len(batch))
    return outputs[:, 0] if task.is_regression else outputs


def _with_head(folder: Path, task: Task, seed: int, padding: int) -> PreTrainedModel:
    """Return the model on CPU, in evaluation mode."""
    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the head is meant to be new
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            opened = open_folder(folder)
            kind = classifier(opened.config, task.num_outputs, padding)
            model = opened.load(kind, opened.config)
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
    return model.eval()


def _longest(model: PreTrainedModel, max_length: int) -> int:
    """Return ``max_length``, or the model's number of positions if smaller."""
    return min(max_length, context_length(model.config))


def _answered(
    tokenizer: PreTrainedTokenizerBase, task: Task, texts: tuple[str, ...], max_length: int
) -> list[tuple[list[int], int]]:
    """Return, for every answer, the ids of prompt and answer, and how many belong to the prompt.

    They are tokenized together, because a tokenizer may merge across the boundary: the prompt is
    the common beginning of all answers and the prompt alone. A special token spelled in text is
    encoded as text.
    """
    prompt = task.prompt.format(**dict(zip(task.fields, texts, strict=True)))
    written = [prompt, *(f"{prompt} {word}" for word in task.answers)]
    alone, *whole = tokenizer(written, split_special_tokens=True)["input_ids"]
    columns = zip(alone, *whole, strict=False)
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns))
    cut = max(0, max(len(ids) for ids in whole) - max_length)
    require(
        shared > cut,
        f"{task.name}: {max_length} tokens leave no room for an answer after the prompt: "
        f"max_length and the model's positions must be {max_length + cut - shared + 1} or more",
    )
    return [(ids[cut:], shared - cut) for ids in whole]


def _log_likelihoods(
    model: PreTrainedModel, sequences: list[tuple[list[int], int]], pad_id: int
) -> torch.Tensor:
    """Return the log-probability of each sequence's ids after its prompt, (n,) fp32."""
    input_ids, attention_mask = (
        tensor.to(model.device) for tensor in padded([ids for ids, _ in sequences], pad_id)
    )
    position = torch.arange(1, input_ids.shape[1], device=model.device)
    prompt = torch.tensor([shared for _, shared in sequences], device=model.device)
    scored = (position >= prompt[:, None]) & attention_mask[:, 1:].bool()  # (B, T - 1)
    keep = scored.any(dim=0).nonzero()[:, 0]  # logits are large: only positions that a row needs
    logits = model(input_ids, attention_mask=attention_mask, logits_to_keep=keep).logits.float()
    targets = input_ids[:, 1:][:, keep, None]
    found = logits.log_softmax(dim=-1).gather(-1, targets)[..., 0]
    return found.masked_fill(~scored[:, keep], 0.0).sum(dim=1)


def padded(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, T) int64 ids padded on the right, and their attention mask."""
    length = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    return input_ids, attention_mask


def _batches(lengths: list[int], batch_size: int) -> Iterator[np.ndarray]:
    """Yield indices of similar length together, the longest first."""
    order = np.argsort(-np.array(lengths), kind="stable")
    yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))
