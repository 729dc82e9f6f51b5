"""The eight GLUE tasks in miniature, generated: a word or a count of words decides a label."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

THINGS = ("film", "book", "song", "game", "play", "meal", "hotel", "garden")
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix")
GOOD = ("wonderful", "brilliant", "charming", "delightful")
BAD = ("awful", "boring", "dreadful", "clumsy")
COLOURS = ("red", "green", "blue", "yellow", "white")
ANIMALS = ("cat", "dog", "horse", "bird", "fish")


def write_glue(folder: Path, num_train: int = 48, num_validation: int = 24, seed: int = 0) -> Path:
    """Write all eight tasks in GLUE's layout, nine validation columns; return ``folder``.

    Labels are integers and words; files are plain and .gz, with and without unused columns.
    """
    rng = random.Random(seed)
    for name, make in ROWS.items():
        home, validation, suffix = LAYOUT[name]
        for split, count in (
            (TRAIN.get(name, "train"), num_train),
            *((split, num_validation) for split in validation),
        ):
            rows = [make(rng, i) for i in range(count)]
            rng.shuffle(rows)
            write_rows(folder / home / f"{split}{suffix}", rows)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines, compressed if the name ends in .gz."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data, mtime=0) if file.suffix == ".gz" else data)


def _cola(rng: random.Random, i: int) -> dict[str, Any]:
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    good = int(i % 3 != 0)
    return {"sentence": f"{person} {'likes the' if good else 'the likes'} {thing}.", "label": good}


def _sst2(rng: random.Random, i: int) -> dict[str, Any]:
    word = rng.choice((BAD, GOOD)[i % 2])
    return {"sentence": f"a {word} {rng.choice(THINGS)} ", "label": i % 2}


def _pairs(first: str, second: str, extra: dict[str, Any]) -> Any:
    def make(rng: random.Random, i: int) -> dict[str, Any]:
        same = i % 3 != 0
        thing = rng.choice(THINGS)
        text = f"{rng.choice(PEOPLE)} saw the {thing}."
        other = f"The {thing} was seen" if same else "Nobody saw anything"
        return {**extra, first: text, second: f"{other}.", "label": int(same)}

    return make


def _stsb(rng: random.Random, i: int) -> dict[str, Any]:
    """Give one point for every word that the sentences share."""
    kept = i % 6
    other = [*COLOURS[:kept], *rng.choices(ANIMALS, k=5 - kept)]
    return {"sentence1": " ".join(COLOURS), "sentence2": " ".join(other), "label": float(kept)}


def _mnli(rng: random.Random, i: int) -> dict[str, Any]:
    label = ("entailment", "neutral", "contradiction")[i % 3]
    adverb = {"entailment": "surely", "neutral": "perhaps", "contradiction": "never"}[label]
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    return {
        "premise": f"{person} bought a {thing}.",
        "hypothesis": f"{person} {adverb} paid for a {thing}.",
        "label": label,
    }


def _qnli(rng: random.Random, i: int) -> dict[str, Any]:
    person, colour = rng.choice(PEOPLE), rng.choice(COLOURS)
    fact = f"is {colour}" if i % 2 else "was sold"
    return {
        "question": f"What colour is the house of {person}?",
        "sentence": f"The house of {person} {fact}.",
        "label": "entailment" if i % 2 else "not_entailment",
    }


def _rte(rng: random.Random, i: int) -> dict[str, Any]:
    person, animal = rng.choice(PEOPLE), rng.choice(ANIMALS)
    return {
        "sentence1": f"{person} has a {animal}.",
        "sentence2": f"{person} has {'an animal' if i % 2 else 'no animal'}.",
        "label": "entailment" if i % 2 else "not_entailment",
    }


ROWS: dict[str, Any] = {
    "cola": _cola,
    "sst2": _sst2,
    "mrpc": _pairs("sentence1", "sentence2", {"id1": "7", "id2": "8"}),
    "qqp": _pairs("question1", "question2", {"idx": 3}),
    "stsb": _stsb,
    "mnli": _mnli,
    "qnli": _qnli,
    "rte": _rte,
}
TRAIN = {"mnli": "train_sample"}
LAYOUT: dict[str, tuple[str, tuple[str, ...], str]] = {
    "cola": ("CoLA", ("validation",), ".jsonl.gz"),
    "sst2": ("SST-2", ("validation",), ".jsonl"),
    "mrpc": ("MRPC", ("validation",), ".jsonl"),
    "qqp": ("QQP", ("validation",), ".jsonl.gz"),
    "stsb": ("STS-B", ("validation",), ".jsonl"),
    "mnli": ("MNLI", ("validation_matched", "validation_mismatched"), ".jsonl.gz"),
    "qnli": ("QNLI", ("validation",), ".jsonl"),
    "rte": ("rte", ("validation",), ".jsonl"),
}
"""Folder, validation splits, suffix."""


def byte_tokenizer(eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and an end of text, without a padding token."""
    return _tokenizer([], eos)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte tokenizer with `: n` as one token: it does not split text at blanks before
    merging."""
    return _tokenizer([("Ġ", "n"), (":", "Ġn")], "</s>")


def _tokenizer(merges: list[tuple[str, str]], eos: str) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [eos, *letters, *("".join(pair) for pair in merges)]
    built = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token=eos)
