"""Last words: a model trained on one text knows its last word and not another's."""

from pathlib import Path

import pytest
import torch

from pmp_ds.errors import UserError
from pmp_ds.evaluate.last_word import Example, encode, last_word, read_texts
from pmp_ds.evaluate.subject import Subject
from tests.unit.evaluate.conftest import write_texts

KNOWN = "the cat sat on a mat"
OTHER = "the cat sat on a fish"


@pytest.fixture
def taught(subject: Subject) -> Subject:
    """Return a model after some updates on KNOWN only."""
    ids = torch.tensor([subject.tokenizer.encode(KNOWN)])
    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        subject.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return subject


def test_accuracy_by_hand(taught: Subject):
    known, other = (encode(taught.tokenizer, text, 64) for text in (KNOWN, OTHER))
    assert taught.tokenizer.decode(known.ids[known.start :]).strip() == "mat"
    assert taught.tokenizer.decode(other.ids[other.start :]).strip() == "fish"
    assert last_word(taught.model, [known], 1)["accuracy"] == 1.0
    assert last_word(taught.model, [other], 1)["accuracy"] == 0.0
    mixed = last_word(taught.model, [known, other, known, other], 3)
    assert (mixed["accuracy"], mixed["texts"]) == (0.5, 4.0)


def test_greedy_continuation_writes_the_word(taught: Subject):
    known = encode(taught.tokenizer, KNOWN, 64)
    written = taught.model.generate(
        input_ids=torch.tensor([known.ids[: known.start]]),
        do_sample=False,
        attention_mask=torch.ones(1, known.start, dtype=torch.int64),
        max_new_tokens=len(known.ids) - known.start,
    )
    assert written[0].tolist() == known.ids


def test_perplexity_and_padding(subject: Subject):
    """A word of several tokens, with longer texts in the same batch."""
    examples = [Example([5, 6, 7, 8], 2), Example([9, 8, 7, 6, 5, 4, 3], 6)]
    nats = 0.0
    for example in examples:
        logits = subject.model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        nats -= sum(
            logits[i - 1, example.ids[i]].item() for i in range(example.start, len(example.ids))
        )
    found = last_word(subject.model, examples, 2)
    assert found["perplexity"] == pytest.approx(torch.tensor(nats / 2).exp().item(), rel=1e-4)


def test_every_token_of_the_word_counts(subject: Subject):
    """The most likely first token followed by the least likely one is not a known word."""
    start = [5, 6, 7]
    best = int(subject.model(input_ids=torch.tensor([start])).logits[0, -1].argmax())
    logits = subject.model(input_ids=torch.tensor([[*start, best]])).logits[0, -1]
    right, wrong = int(logits.argmax()), int(logits.argmin())
    found = [
        last_word(subject.model, [Example([*start, best, last], 3)], 1)["accuracy"]
        for last in (right, wrong)
    ]
    assert found == [1.0, 0.0]


def test_long_text_keeps_its_end(subject: Subject):
    whole = encode(subject.tokenizer, KNOWN, 64)
    cut = encode(subject.tokenizer, KNOWN, len(whole.ids) - whole.start + 2)
    assert cut.start == 2
    assert cut.ids == whole.ids[whole.start - 2 :]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "two words"}\n{"txt": "a"}\n', "line 2 is not"),
        ("a.jsonl", "no json\n", "line 1 is not"),
        ("a.jsonl", '{"text": "alone"}\n', "line 1: 'alone' has fewer than two words"),
        ("a.jsonl", "\n\n", "is empty"),
        ("a.txt", "", "is empty"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path / name)


def test_read_texts(tmp_path: Path):
    path = write_texts(tmp_path / "a.jsonl", [" one two ", "three four"])
    assert read_texts(path) == ["one two", "three four"]
    (tmp_path / "a.txt").write_text("one two\n\nthree four\n")
    assert read_texts(tmp_path / "a.txt") == ["one two", "three four"]
