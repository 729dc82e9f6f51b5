"""Batched scores against one example at a time: no padding, no batches, all logits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pmp_ds.errors import UserError
from pmp_ds.evaluate.zero_shot import untrained_head, zero_shot
from pmp_ds.glue.read import Rows, TaskData, load
from pmp_ds.glue.tasks import TASKS, Task
from pmp_ds.progress import Progress
from tests.helpers import tiny
from tests.helpers.glue import byte_tokenizer, merging_tokenizer, write_glue

TOLERANCE = 1e-4  # nats, of sums of fp32 logarithms around -100


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskData]:
    folder = write_glue(tmp_path_factory.mktemp("glue"), num_validation=7)
    return {name: load(task, folder) for name, task in TASKS.items()}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Return a model with clear preferences: the logits of initial weights are nearly equal."""
    model = tiny.model(replace(tiny.LLAMA, max_positions=256)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    return model


def first_rows(data: TaskData) -> Rows:
    return next(iter(data.validation.values()))


@torch.no_grad()
def naive(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Rows, longest: int
) -> np.ndarray:
    """Return (n, answers): the scores of zero_shot, computed plainly."""
    template, words = task.prompt, task.answers
    scores = []
    for texts in rows.texts:
        prompt = template.format(**dict(zip(task.fields, texts, strict=True)))
        alone = tokenizer(prompt)["input_ids"]
        whole = [tokenizer(f"{prompt} {word}")["input_ids"] for word in words]
        shared = 0
        while shared < len(alone) and all(ids[shared] == alone[shared] for ids in whole):
            shared += 1
        cut = max(0, max(len(ids) for ids in whole) - longest)
        for ids in whole:
            logs = model(torch.tensor([ids[cut:]])).logits[0].log_softmax(-1)
            kept = range(shared - cut, len(ids) - cut)
            scores.append(sum(logs[i - 1, ids[cut + i]].item() for i in kept))
    return np.array(scores).reshape(len(rows), len(words))


def test_every_task_as_one_by_one(model: PreTrainedModel, data: dict[str, TaskData]):
    tokenizer = byte_tokenizer()
    for name, task in TASKS.items():
        rows = first_rows(data[name])
        bar = Progress("zero-shot", "row", total=len(rows), disable=True)
        found = zero_shot(model, tokenizer, task, rows, batch_size=3, bar=bar)
        expected = naive(model, tokenizer, task, rows, 256)
        assert bar.n == len(rows) == 7
        if name == "stsb":
            odds = np.exp(expected - expected.max(axis=1, keepdims=True))
            expected = (odds / odds.sum(axis=1, keepdims=True)) @ np.arange(6)
            assert 0 < expected.min() < expected.max() < 5
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        assert np.std(expected) > 100 * TOLERANCE, "too flat to tell one row from another"
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_answers_stand_for_the_labels():
    meanings = {
        name: dict(zip(task.labels, task.answers, strict=True))
        for name, task in TASKS.items()
        if task.labels is not None
    }
    assert meanings == {
        "cola": {"unacceptable": "no", "acceptable": "yes"},
        "sst2": {"negative": "negative", "positive": "positive"},
        "mrpc": {"not_equivalent": "no", "equivalent": "yes"},
        "qqp": {"not_duplicate": "no", "duplicate": "yes"},
        "mnli": {"entailment": "yes", "neutral": "maybe", "contradiction": "no"},
        "qnli": {"entailment": "yes", "not_entailment": "no"},
        "rte": {"entailment": "yes", "not_entailment": "no"},
    }


def test_a_tokenizer_that_merges_prompt_and_answer(
    model: PreTrainedModel, data: dict[str, TaskData]
):
    """Its token for `: no` begins in the prompt: both answers are scored from there."""
    task, rows = TASKS["rte"], first_rows(data["rte"])
    tokenizer = merging_tokenizer()
    prompt = tokenizer("Answer:")["input_ids"]
    assert tokenizer("Answer: no")["input_ids"][: len(prompt)] != prompt
    assert tokenizer("Answer: yes")["input_ids"][: len(prompt)] == prompt
    found = zero_shot(model, tokenizer, task, rows, batch_size=4)
    np.testing.assert_allclose(
        found, naive(model, tokenizer, task, rows, 256), rtol=0, atol=TOLERANCE
    )


def test_long_prompts_are_cut_at_their_beginning(data: dict[str, TaskData]):
    """GPT-2 has 64 positions here, and every prompt has more characters."""
    gpt2, tokenizer = tiny.model(tiny.GPT2).eval(), byte_tokenizer()
    with torch.no_grad():
        gpt2.transformer.wte.weight.mul_(20)
    task, rows = TASKS["mnli"], first_rows(data["mnli"])
    for max_length, longest in ((256, 64), (40, 40)):
        found = zero_shot(gpt2, tokenizer, task, rows, max_length=max_length)
        np.testing.assert_allclose(
            found, naive(gpt2, tokenizer, task, rows, longest), rtol=0, atol=TOLERANCE
        )
    # " maybe" takes 6 tokens and needs one before it
    with pytest.raises(UserError, match=r"mnli: 6 tokens leave no room .* must be 7 or more"):
        zero_shot(gpt2, tokenizer, task, rows, max_length=6)
    assert zero_shot(gpt2, tokenizer, task, rows, max_length=7).shape == (7, 3)


def test_a_special_token_in_a_text_is_text(model: PreTrainedModel):
    """The result equals that of a tokenizer that gives the same token another name."""
    tokenizer, task = byte_tokenizer(), TASKS["sst2"]
    spelled = zero_shot(model, tokenizer, task, Rows([("a</s>b",)], np.zeros(1)))
    assert tokenizer("a</s>b")["input_ids"][1] == tokenizer.eos_token_id
    blind = byte_tokenizer(eos="<end>")
    expected = zero_shot(model, blind, task, Rows([("a</s>b",)], np.zeros(1)))
    np.testing.assert_allclose(spelled, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel) -> Path:
    folder = tmp_path_factory.mktemp("release")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["mnli", "stsb"])
def test_untrained_head_reads_the_last_token(name: str, release: Path, data: dict[str, TaskData]):
    task, rows = TASKS[name], first_rows(data[name])
    before = torch.get_rng_state()
    outputs = untrained_head(release, task, rows, seed=1, batch_size=3, max_length=64)
    assert torch.equal(torch.get_rng_state(), before)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(
            release, num_labels=task.num_outputs
        )
    tokenizer = byte_tokenizer()
    assert len({len(first + second) for first, second in rows.texts}) > 1, "nothing to pad"
    with torch.no_grad():
        expected = [
            model.score(
                model.model(
                    torch.tensor([tokenizer(f"{first}\n{second}")["input_ids"]])
                ).last_hidden_state[0, -1]
            ).tolist()
            for first, second in rows.texts
        ]
    assert np.std(expected) > 0.01
    shape = (7,) if name == "stsb" else (7, 3)
    np.testing.assert_allclose(outputs, np.reshape(expected, shape), rtol=0, atol=1e-5)


def test_head_is_decided_by_its_seed_and_loads_in_silence(
    release: Path, data: dict[str, TaskData], capfd: pytest.CaptureFixture[str]
):
    task, rows = TASKS["sst2"], first_rows(data["sst2"])
    one, again, two = (untrained_head(release, task, rows, seed) for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != two).all()
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_a_model(tmp_path: Path, data: dict[str, TaskData]):
    with pytest.raises(UserError, match="absent is not a folder: name the folder of a model"):
        untrained_head(tmp_path / "absent", TASKS["sst2"], first_rows(data["sst2"]), 0)
