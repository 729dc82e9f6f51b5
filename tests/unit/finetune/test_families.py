"""Ordinary models of other families are fine-tuned, or refused with a one-line error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from pmp_ds.discover.discover import random_ticket
from pmp_ds.errors import UserError
from pmp_ds.finetune.methods import load_model, mask_of, open_ticket
from pmp_ds.finetune.rows import Classification
from pmp_ds.finetune.tasks import Glue
from pmp_ds.model.build import UNBOUNDED, build_model, context_length
from pmp_ds.model.classifier import pad_id
from pmp_ds.model.folder import open_folder
from pmp_ds.model.parameters import parameter_table
from pmp_ds.ticket.ticket import save_ticket
from tests.helpers.families import QUICK, MaskConfig, settings, tiny_config
from tests.helpers.faults import seen
from tests.helpers.glue import byte_tokenizer


def write(folder: Path, kind: str, **values: Any) -> None:
    """Write a tiny model of a family, as it would be downloaded, and a ticket for it."""
    folder.mkdir(exist_ok=True)
    config = tiny_config(kind)
    config.vocab_size = len(byte_tokenizer())
    for name, value in {"eos_token_id": 0, "pad_token_id": None, **values}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = build_model(config)
    ticket = random_ticket(b"t" * 32, MaskConfig(source="random"), parameter_table(model))
    save_ticket(ticket, folder / "ticket")
    model.save_pretrained(folder / "release")
    byte_tokenizer().save_pretrained(folder / "release")


def classify(folder: Path) -> tuple[Any, torch.Tensor]:
    """Return the classifier with a head trained whole, and its logits for four rows."""
    config = settings(folder)
    task = Glue(config)
    model = load_model(config, task.num_labels).eval()
    mask, _ = mask_of(config, open_ticket(config), model)
    assert mask is not None
    new = mask.shapes.keys() - open_folder(folder / "release").shapes.keys()
    assert new
    assert all(bool(mask.full(name).all()) for name in new)
    rows = torch.from_numpy(task.samples.gather(np.arange(4)))
    with torch.no_grad():
        return model, Classification().logits(model, rows)


@pytest.mark.parametrize("kind", QUICK)
def test_a_classifier_of_each_family(kind: str, tmp_path: Path) -> None:
    write(tmp_path, kind)
    _, logits = classify(tmp_path)
    assert logits.shape == (4, 2)
    assert bool(logits.isfinite().all())


def test_one_of_several_ends_of_text_pads(tmp_path: Path) -> None:
    """As in every Llama 3."""
    write(tmp_path, "llama", eos_token_id=[0, 5])
    model, logits = classify(tmp_path)
    assert model.config.pad_token_id == 0
    write(tmp_path / "one", "llama")
    assert torch.equal(logits, classify(tmp_path / "one")[1])


def test_no_end_of_text(tmp_path: Path) -> None:
    write(tmp_path, "llama", eos_token_id=None)
    with pytest.raises(UserError) as caught:
        Glue(settings(tmp_path))
    seen("no end of text", 1, f"error: {caught.value}")
    config = CONFIG_MAPPING["llama"](eos_token_id=None, pad_token_id=7)
    assert pad_id(config) == 7


def test_longest_context_by_any_name() -> None:
    for kind, values, longest in (
        ("llama", {"max_position_embeddings": 99}, 99),
        ("gpt2", {"n_positions": 98}, 98),
        ("mpt", {"max_seq_len": 97}, 97),
        ("bloom", {}, UNBOUNDED),
        ("mamba", {}, UNBOUNDED),
    ):
        assert context_length(CONFIG_MAPPING[kind](**values)) == longest


def test_a_head_of_our_own_on_a_family_without_one(tmp_path: Path) -> None:
    """Backbone and ticket under the names of the causal model; saved and loaded like any other."""
    write(tmp_path, "granite")
    model, logits = classify(tmp_path)
    assert type(model).__name__ == "GraniteForSequenceClassification"
    causal = open_folder(tmp_path / "release").load()
    backbone = dict(causal.named_parameters())
    for name, param in model.named_parameters():
        assert name == "score.weight" or torch.equal(param, backbone[name])
    model.save_pretrained(tmp_path / "tuned")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()
    rows = torch.from_numpy(Glue(settings(tmp_path)).samples.gather(np.arange(4)))
    with torch.no_grad():
        assert torch.equal(Classification().logits(again, rows), logits)


def test_a_family_that_takes_no_head_is_refused_in_a_line(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "transformers.modeling_layers.GenericForSequenceClassification.forward",
        lambda self, **_: None,
    )
    write(tmp_path, "cohere")
    with pytest.raises(UserError) as caught:
        classify(tmp_path)
    seen("no classifier", 1, f"error: {caught.value}")
    assert "\n" not in str(caught.value)


def test_a_head_that_takes_rows_of_some_lengths_only_is_refused(tmp_path: Path) -> None:
    """Reformer trains on multiples of its chunks, and rows are as long as their text."""
    write(tmp_path, "reformer")
    with pytest.raises(UserError, match=r"does not train on rows of any length\. Fine-tune it on"):
        classify(tmp_path)


def test_a_classifier_on_another_model_than_the_causal_one_is_refused(tmp_path: Path) -> None:
    """Its encoder would be random, without any message."""
    write(tmp_path, "bart")
    with pytest.raises(UserError, match=r"model: model\.encoder\..* more would be") as caught:
        classify(tmp_path)
    seen("other classifier", 1, f"error: {caught.value}")
    assert json.loads((tmp_path / "release" / "config.json").read_text())["model_type"] == "bart"
