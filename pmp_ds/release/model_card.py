"""README.md of a release: its training and data, and the promises of PMP and their limits."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pmp_ds.errors import UserError
from pmp_ds.prepare.corpus import STREAM

_SHOWN_TOKENS = 40
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")
_DATASET = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The card's facts about a run. None depends on the mask or reveals its density."""

    name: str
    """Name of the model."""

    secrecy: Literal["secret", "given", "public", "none"]
    """`secret`: PMP from secret random weights. `given`: PMP from weights that the owner gave.
    `public`: PMP from a public seed (paper mode). `none`: ordinary pretraining, every parameter
    trained."""

    tokens: int
    """Tokens seen in training, including repetitions."""

    updates: int
    global_batch_size: int
    """Sequences per update."""

    block_size: int
    """Tokens per sequence."""

    schedule: str
    """Optimizer and learning rate in words."""

    val_loss: float | None
    """Nats per token on held-out documents."""

    dataset_sources: tuple[str, ...]
    data_description: str
    date: str
    """Day of the export, YYYY-MM-DD."""

    license: str | None = None
    """Identifier for the front matter, such as `apache-2.0`."""

    languages: tuple[str, ...] = ()
    """Codes of ISO 639 for the front matter."""

    datasets: tuple[str, ...] = ()
    """Names on the Hugging Face hub for the front matter; empty: those of the run's data."""


@dataclass(frozen=True, kw_only=True)
class DerivativeFacts:
    """The card's facts about a fine-tuned model."""

    name: str
    base: str
    """Name of the release that was fine-tuned."""

    date: str
    license: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


def check_metadata(languages: Sequence[str], datasets: Sequence[str]) -> None:
    """Raise UserError for a language that is not a code, or a data set that is a path."""
    for language in languages:
        if not _LANGUAGE.fullmatch(language):
            raise UserError(f"--language {language!r} is not a code such as en or pt-BR")
    for name in datasets:
        if not _DATASET.fullmatch(name) or Path(name).exists():
            raise UserError(
                f"--dataset {name!r} is not a name on the Hugging Face hub, such as OWNER/NAME; "
                "a path would reveal details of this machine"
            )


def render(
    facts: CardFacts | DerivativeFacts, config: dict[str, Any], num_params: int, dtype: str
) -> str:
    """Return the card's Markdown with YAML front matter; ``config`` is the released config.json."""
    secrecy = facts.secrecy if isinstance(facts, CardFacts) else "secret"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": facts.license,
        "language": facts.languages,
        "datasets": facts.datasets or _streamed(facts),
    }
    said = (f"{key}: {json.dumps(value)}" for key, value in sorted(front.items()) if value)
    tags = ["causal-lm"] + (["pmp"] if secrecy != "none" else [])
    lines = ["---", *said]
    lines += [f"tags: {json.dumps(tags)}", "---", "", f"# {facts.name}", ""]
    if isinstance(facts, DerivativeFacts):
        lines += [_FINE_TUNED.format(base=facts.base, date=facts.date), ""]
    else:
        lines += [_LEAD[secrecy], ""]
    lines += ["## Model", "", *_table(_architecture(config, num_params, dtype)), ""]
    if isinstance(facts, CardFacts):
        lines += ["## Training", "", *_table(_training(facts)), "", "## Data", ""]
        lines += [facts.data_description, ""]
        lines += [f"- {_public_source(source)}" for source in facts.dataset_sources]
        lines += ["", "## Evaluation", "", *_table(_evaluation(facts.val_loss)), ""]
    context = config.get("max_position_embeddings") or config.get("n_positions") or _SHOWN_TOKENS
    lines += ["## Use", "", _USE.format(new=min(_SHOWN_TOKENS, context // 2)), ""]
    if secrecy != "none":
        lines += ["## What Private Mask Pre-Training promises, and what it does not", ""]
        lines += [_PROMISE, ""]
        if secrecy == "public":
            lines += [_PUBLIC_SEED, ""]
    return "\n".join(lines)


def _architecture(config: dict[str, Any], num_params: int, dtype: str) -> list[tuple[str, str]]:
    def first(*keys: str) -> str:
        return next((str(config[key]) for key in keys if config.get(key) is not None), "-")

    return [
        ("Architecture", config["architectures"][0]),
        ("Parameters", f"{num_params:,} (tied weights counted once)"),
        ("Layers", first("num_hidden_layers", "n_layer")),
        ("Hidden size", first("hidden_size", "n_embd")),
        ("Attention heads", first("num_attention_heads", "n_head")),
        ("Vocabulary", first("vocab_size")),
        ("Longest context", f"{first('max_position_embeddings', 'n_positions')} tokens"),
        ("Weights", dtype),
    ]


def _training(facts: CardFacts) -> list[tuple[str, str]]:
    batch = f"{facts.global_batch_size} sequences of {facts.block_size} tokens"
    return [
        ("Tokens", f"{facts.tokens:,}"),
        ("Updates", f"{facts.updates:,}"),
        ("Batch", batch),
        ("Schedule", facts.schedule),
        ("Exported", facts.date),
    ]


def _evaluation(val_loss: float | None) -> list[tuple[str, str]]:
    if val_loss is None:
        return [("Held-out documents", "not measured")]
    return [
        ("Validation loss", f"{val_loss:.4f} nats per token of held-out documents"),
        ("Perplexity", f"{math.exp(val_loss):.2f} per token"),
        ("Anything else", "not measured"),
    ]


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]


def _streamed(facts: CardFacts | DerivativeFacts) -> tuple[str, ...]:
    """Return the hub's data sets that a run's data came from; the card lists them in any case."""
    sources = facts.dataset_sources if isinstance(facts, CardFacts) else ()
    names = (source.removeprefix(STREAM) for source in sources if source.startswith(STREAM))
    return tuple(name for name in names if _DATASET.fullmatch(name))


def _public_source(source: str) -> str:
    """Return a data set's name, or only the last part of a local file or folder."""
    path = Path(source)
    hub_or_word = not source.startswith((".", "~", "/")) and source.count("/") <= 1
    return f"`{source if hub_or_word and not path.exists() else path.name}`"


_PMP = (
    "A causal language model trained with Private Mask Pre-Training "
    "([PMP](https://arxiv.org/abs/2602.00446)): training changed a private subset of the "
    "parameters, and the others keep their {initial} values. These are ordinary dense "
    "weights; which parameters belong to the subset is not part of this release."
)
_LEAD = {
    "secret": _PMP.format(initial="random initial"),
    "given": _PMP.format(initial="initial"),
    "public": _PMP.format(initial="random initial"),
    "none": "A causal language model with ordinary pretraining: every parameter was trained.",
}
_FINE_TUNED = (
    "A causal language model, fine-tuned from `{base}`, which was trained with Private Mask "
    "Pre-Training ([PMP](https://arxiv.org/abs/2602.00446)). Exported {date}."
)
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # the folder of this card
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("Once", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={new})
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

Meant for text completion and for research on pretraining. It has had no instruction tuning and no
safety training: it repeats its data, including errors and prejudice. Check `SHA256SUMS` with
`sha256sum -c SHA256SUMS`."""
_PROMISE = """PMP aims to make fine-tuning without the private mask gain less than it would on an
ordinary model of equal quality. It changes nothing about inference.

It is a deterrent, not a lock:

- Nothing stops anyone from fine-tuning these weights, or from training them longer. How much less
  that gains depends on the model, the task and the budget; measure it before you rely on it.
- The mask is hidden, not encrypted. Weight magnitudes, gradients and a model that an attacker
  trains in the same way all reveal something about it. A second revision of this model, its
  initial weights, or a model that was fine-tuned with the mask reveals far more.
- A mask that has been handed to a partner cannot be revoked.
- It is no licence, no watermark and no measure against misuse by prompting."""
_PUBLIC_SEED = (
    "**The initial weights of this model come from a public seed**, to reproduce the paper. "
    "Anyone who knows that seed and the configuration can compute the mask: it is not secret."
)
