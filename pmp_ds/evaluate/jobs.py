"""Measurements as jobs: settings, execution, and values in words."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pmp_ds.data.arrow_store import Store
from pmp_ds.evaluate import last_word as last_word_
from pmp_ds.evaluate import perplexity as perplexity_
from pmp_ds.evaluate.subject import Subject
from pmp_ds.progress import Progress
from pmp_ds.run_dir import sha256

Values = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A future line of results.jsonl."""

    kind: str
    settings: dict[str, Any]
    """Everything besides the model that determines the values, except for rounding."""
    run: Callable[[], Values]
    words: Callable[[Values], str]


@dataclass(frozen=True)
class Text:
    """A fixed selection of blocks of a store."""

    store: Store
    split: str
    blocks: int
    batch_size: int

    @property
    def settings(self) -> dict[str, Any]:
        return {"store": self.store.dataset_id, "split": self.split, "blocks": self.blocks}


def perplexity(subject: Subject, text: Text) -> Job:
    subject.require_vocabulary(text.store)
    blocks = perplexity_.held_out(text.store, text.split, text.blocks)
    tokenizer = subject.tokenizer if subject.has_tokenizer else None

    def run() -> Values:
        with Progress("perplexity", "block", len(blocks)) as bar:
            return perplexity_.perplexity(
                subject.model, blocks, text.batch_size, tokenizer, bar.update
            )

    def words(values: Values) -> str:
        bits = values.get("bits_per_byte")
        return (
            f"loss {values['loss']:.4f} nats per token, perplexity {values['perplexity']:.2f}"
            + (f", {bits:.3f} bits per byte" if bits is not None else "")
            + f" ({len(blocks)} blocks of {text.split})"
        )

    return Job("perplexity", text.settings, run, words)


def last_word(subject: Subject, path: Path, batch_size: int) -> Job:
    texts = last_word_.read_texts(path)
    examples = [last_word_.encode(subject.tokenizer, t, subject.max_positions) for t in texts]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()

    def run() -> Values:
        with Progress("last word", "text", len(examples)) as bar:
            return last_word_.last_word(subject.model, examples, batch_size, bar.update)

    def words(values: Values) -> str:
        return (
            f"accuracy {values['accuracy']:.4f}, perplexity {values['perplexity']:.2f} of the last "
            f"word ({len(texts)} texts)"
        )

    return Job("last_word", {"text": digest}, run, words)


def glue(
    subject: Subject,
    tasks: Sequence[str],
    folder: Path | None,
    seeds: Sequence[int],
    batch_size: int,
) -> Iterator[Job]:
    """Return, for each task, a zero-shot job and one job per seed of the head."""
    from pmp_ds.evaluate import glue as glue_
    from pmp_ds.glue.read import load
    from pmp_ds.glue.tasks import find_task

    def words(values: Values) -> str:
        return "; ".join(
            f"{column} "
            + ", ".join(f"{n} {v:.4f} ({values['majority'][column][n]:.4f})" for n, v in m.items())
            for column, m in values["metrics"].items()
        )

    for task in [find_task(name) for name in tasks]:
        data = load(task, folder)
        settings = glue_.data_settings(data) | {"max_length": glue_.MAX_LENGTH}
        yield Job(
            "zero-shot", settings, partial(glue_.zero_shot_values, subject, data, batch_size), words
        )
        for seed in seeds:
            yield Job(
                "untrained-head",
                settings | {"seed": seed},
                partial(glue_.head_values, subject, data, seed, batch_size),
                words,
            )


def lm_eval(
    subject: Subject,
    tasks: Sequence[str],
    task_dir: Path | None,
    limit: int | None,
    batch_size: int,
) -> Iterator[Job]:
    """Return one job per task."""
    from pmp_ds.evaluate import harness

    settings: Values = {"limit": limit, "lm_eval": harness.installed()}
    if task_dir is not None:
        settings["task_dir"] = _content(task_dir)
    manager = harness.task_manager(tasks, task_dir)

    def words(values: Values) -> str:
        return "; ".join(
            (f"{name}: " if len(values["metrics"]) > 1 else "")
            + ", ".join(f"{n.removesuffix(',none')} {v:.4g}" for n, v in found.items())
            for name, found in values["metrics"].items()
        )

    for task in tasks:
        yield Job(
            "lm_eval",
            {"task": task} | settings,
            partial(harness.run_task, subject, task, manager, limit, batch_size),
            words,
        )


def _content(folder: Path) -> str:
    """Return the sha256 (hex) over the names and contents of the files in a folder."""
    sha = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sha.update(f"{path.relative_to(folder).as_posix()}\n{path.stat().st_size}\n".encode())
        sha.update(sha256(path).encode())
    return sha.hexdigest()
