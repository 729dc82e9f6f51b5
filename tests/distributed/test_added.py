"""A method, a task, a score, an optimizer and a schedule, each added in one place, work from the
flag to the result."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pmp_ds import results
from pmp_ds.cli import parse
from pmp_ds.config import Config, TrainConfig
from pmp_ds.config.rules import RULES, Rule
from pmp_ds.config.schedules import SCHEDULES, Schedule
from pmp_ds.errors import UserError
from pmp_ds.evaluate.zero_shot import zero_shot
from pmp_ds.finetune.config import FinetuneConfig
from pmp_ds.finetune.method import METHODS, Method
from pmp_ds.finetune.methods import with_head
from pmp_ds.glue.read import load
from pmp_ds.glue.tasks import TASKS, Task
from pmp_ds.model.folder import open_folder, open_tokenizer
from pmp_ds.optim.masked import MaskedOptimizer, Params
from pmp_ds.optim.schedule import in_words, learning_rate
from pmp_ds.study.glue_tables import table_methods
from pmp_ds.study.runs import fine_tunes
from pmp_ds.ticket.mask import ParamMask, full_bits, unpack
from pmp_ds.ticket.scores import SCORES, Score, Scores, find_score
from pmp_ds.ticket.topk import select_top_k
from tests.helpers.finetune import tune, write_model


def only_norms(config: FinetuneConfig, ticket: Any, model: Any) -> tuple[ParamMask, str]:
    shapes = open_folder(Path(config.model)).trained
    bits = {
        name: full_bits(shape[0]) if len(shape) == 1 else 0 * full_bits(torch.Size(shape).numel())
        for name, shape in shapes.items()
    }
    return with_head(ParamMask(bits=bits, shapes=dict(shapes)), model), "norms"


NORMS = Method(
    name="norms", title="Norms alone", kept=only_norms, facts={"norms": lambda c: c.density}
)


class SignDescent(MaskedOptimizer):
    """A step of the same length for every trained element, after the sign of all gradients."""

    moments = ("total",)
    updates = 0

    @classmethod
    def settings(cls, config: TrainConfig) -> dict[str, Any]:
        return {}

    def __init__(
        self, params: Params, lr: float, weight_decay: float = 0.0, **storage: Any
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, defaults, **storage)

    def rule(
        self,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        moments: list[torch.Tensor],
        group: dict[str, Any],
        step: float,
    ) -> None:
        SignDescent.updates += 1
        (total,) = moments
        weights.sub_(group["lr"] * total.add_(gradient).sign())


SIGN = Rule("sign", "Sign descent", (0.0, 0.0), __name__, "SignDescent")
STAIRS = Schedule(
    name="stairs",
    left=lambda progress: 1.0 if progress < 0.5 else 0.25,
    title="a quarter for the second half of {updates} updates",
)
PARITY = Task(
    name="parity",
    folder="Parity",
    fields=("digits",),
    labels=("even", "odd"),
    metrics=("accuracy",),
    splits={"validation": "Parity"},
    prompt="{digits} is even or odd:",
    answers=("even", "odd"),
)


def added() -> ExitStack:
    stack = ExitStack()
    stack.enter_context(mock.patch.dict(METHODS, {"norms": NORMS}))
    stack.enter_context(mock.patch.dict(TASKS, {"parity": PARITY}))
    stack.enter_context(mock.patch.dict(RULES, {"sign": SIGN}))
    stack.enter_context(mock.patch.dict(SCHEDULES, {"stairs": STAIRS}))
    return stack


def tuned(folder: str) -> tuple[results.Result, tuple[int, ...], int]:
    """Fine-tune on the task with the method; return the result and the shape of its zero-shot
    scores."""
    home = Path(folder)
    write_model(home)
    (home / "glue" / "Parity").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [{"digits": str(i), "label": i % 2} for i in range(16)]
        text = "\n".join(map(json.dumps, rows))
        (home / "glue" / "Parity" / f"{split}.jsonl").write_text(text)
    with added():
        (found,) = tune(
            folder,
            [
                "--task",
                "parity",
                "--method",
                "norms",
                "--data.glue_dir",
                f"{home}/glue",
                "--train.steps",
                "2",
                "--train.global_batch_size",
                "4",
                "--run.checkpoint_every",
                "9",
                "--train.optimizer",
                "sign",
                "--train.schedule",
                "stairs",
            ],
        )
        data = load(PARITY, home / "glue")
        release = home / "release"
        model = open_folder(release).load()
        shape = zero_shot(model, open_tokenizer(release), PARITY, data.validation["Parity"]).shape
    return found, shape, SignDescent.updates


@pytest.mark.distributed
def test_a_method_a_task_an_optimizer_and_a_schedule(ranks1, tmp_path):
    ((found, shape, updates),) = ranks1.run(tuned, str(tmp_path))
    assert found.settings["method"] == "norms"
    assert (found.settings["task"], found.settings["norms"]) == ("parity", 0.7)
    assert (found.settings["optimizer"], found.settings["schedule"]) == ("sign", "stairs")
    assert updates > 0
    assert 0 <= found.values["metrics"]["Parity"]["accuracy"] <= 1
    assert found.values["trainable"] == 5 * 32 + 2 * 32  # norms of two blocks and the last; head
    assert results.read(tmp_path / "runs/finetune/results.jsonl") == [found]
    assert shape == (16, 2)
    with added():
        runs = fine_tunes([replace(found, arm=arm) for arm in ("base", "pmp")])
        rows = table_methods(runs).rows
    assert [row[:2] for row in rows] == [("base", "Norms alone"), ("pmp", "Norms alone")]


@pytest.mark.distributed
def test_an_unknown_score_is_refused_before_anything_is_written(lives, run):
    one, _ = lives("--mask.source", "earlybird", "--mask.score", "other")
    assert (one.code, run.root.exists()) == (1, False)
    assert "mask.score='other' is unknown; the scores are mean, ema, gradient" in one.err


def test_unknown_ones_are_told_all_names():
    given = ["--model", "m", "--task", "sst2", "--method"]
    with added():
        assert parse(FinetuneConfig, [*given, "norms"])[0].method == "norms"
        with pytest.raises(UserError, match=r"'other' is unknown; .* full, lora, .*, norms$"):
            parse(FinetuneConfig, [*given, "other"])
        for name, last in (("optimizer", "sgd, sign"), ("schedule", "wsd, stairs")):
            found = parse(Config, [f"--train.{name}", last.partition(", ")[2]])[0]
            assert getattr(found.train, name) == last.partition(", ")[2]
            with pytest.raises(UserError, match=rf"train\.{name}='other' is unknown; .*, {last}$"):
                parse(Config, [f"--train.{name}", "other"])
        with pytest.raises(UserError, match=r"train\.precision='fp8' is unknown; the prec"):
            parse(Config, ["--train.precision", "fp8"])


def test_rates_and_words_of_a_schedule():
    with added():
        config = TrainConfig(optimizer="sign", schedule="stairs", steps=4, warmup_steps=0, lr=8.0)
        assert [learning_rate(config, step) for step in range(1, 5)] == [8.0, 2.0, 2.0, 2.0]
        assert "Sign descent, peak" in in_words(config)
        assert "a quarter for the second half of 4 updates" in in_words(config)


def _largest(value: torch.Tensor, gradient: torch.Tensor, scale: float, decay: float) -> None:
    torch.maximum(value, gradient.abs() / scale, out=value)


def test_a_score():
    """The score is the largest |g| so far: element 1 has it, though others have a larger mean."""
    with mock.patch.dict(SCORES, {"largest": Score("largest", _largest)}):
        config, _ = parse(Config, ["--mask.score", "largest"])
        scores = Scores(config.mask.score)
        for gradient in ([2.0, -5.0, 3.0], [3.0, 0.0, 4.0]):
            ranked = scores.update([torch.tensor(gradient)])
        (bits,) = select_top_k(ranked, [0], ["w"], 1)
        assert unpack(bits, 3).tolist() == [False, True, False]
        with pytest.raises(UserError, match=r"'other' is unknown; .* gradient, largest$"):
            find_score("other")
