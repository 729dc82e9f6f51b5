"""A ticket names the trained parameters, not those that an architecture or its user froze."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pmp_ds.config import Config, MaskConfig, ModelConfig
from pmp_ds.discover.discover import random_ticket
from pmp_ds.errors import UserError
from pmp_ds.evaluate.gradients import accumulate, compare
from pmp_ds.evaluate.subject import mask_on
from pmp_ds.model.build import build_model
from pmp_ds.model.classifier import classifier
from pmp_ds.model.folder import ModelFolder, open_folder
from pmp_ds.model.initial import Initial
from pmp_ds.model.parameters import digest, parameter_table, trained_shapes
from pmp_ds.optim.attach import attach
from pmp_ds.optim.masked_adamw import MaskedAdamW
from pmp_ds.run_dir import RunDir
from pmp_ds.state import theta0, weight_files
from pmp_ds.state.plain_weights import PlainWeights, complement_changes
from pmp_ds.state.run_record import DataFacts
from pmp_ds.ticket.mask import ParamMask, pack
from tests.helpers.families import tiny_config

FROZEN = {
    "ernie4_5_moe": "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias",
    "roformer": "roformer.encoder.embed_positions.weight",
}


@pytest.fixture(params=FROZEN)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_model(tiny_config(kind))


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> ModelFolder:
    weight_files.save_all(dict(model.named_parameters()), model.config, tmp_path)
    return open_folder(tmp_path)


def mask_of(model: nn.Module) -> ParamMask:
    return random_ticket(b"m" * 32, MaskConfig(), parameter_table(model)).mask


def test_one_answer_of_files_and_models(kind: str, model: PreTrainedModel, folder: ModelFolder):
    shapes = mask_of(model).shapes
    assert folder.trained == shapes
    assert folder.shapes.keys() - shapes.keys() == {FROZEN[kind]}
    assert trained_shapes(folder.load()) == shapes, "a model that is loaded would train all of it"
    tuned = folder.load(classifier(folder.config, 2, padding=0), folder.config)
    assert FROZEN[kind] not in trained_shapes(tuned)
    assert FROZEN[kind] in tuned.state_dict()


def test_a_given_ticket_is_accepted(kind: str, model: PreTrainedModel, tmp_path: Path):
    """`mask.source: file`: the digest comes from the meta device."""
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(model.config.to_dict()))
    config = Config(model=ModelConfig(family="auto", path=str(path)))
    facts = DataFacts(
        dataset_id="d",
        documents=1,
        tokens=1,
        vocab_size=model.config.vocab_size,
        eos_id=0,
        bos_id=None,
        block_size=8,
        unigram_cross_entropy=1.0,
        sources=(),
    )
    run = RunDir(tmp_path / "run")
    assert theta0.model_digest(config, facts, run) == digest(parameter_table(model))


def test_gradients_in_and_out_of_the_ticket(model: PreTrainedModel):
    mask = mask_on(mask_of(model), model, Path("release"))
    accumulate(model, torch.arange(16).view(2, 8), 2)
    assert sum(compare(model, mask, frozenset())["elements"].values()) == mask.num_params


def test_a_frozen_parameter_that_changed_is_counted(
    kind: str, model: PreTrainedModel, folder: ModelFolder
):
    weights, mask = PlainWeights(folder.path, 1, None), mask_of(model)
    initial = Initial(model.config, 0)
    assert complement_changes(weights, initial, mask) == 0
    with torch.no_grad():
        frozen = model.get_parameter(FROZEN[kind]).add_(1)
    weight_files.save_all(dict(model.named_parameters()), model.config, folder.path)
    assert complement_changes(weights, initial, mask) == frozen.numel()
    shares = [complement_changes(weights, initial, mask, (rank, 3)) for rank in range(3)]
    assert sum(shares) == frozen.numel()


class Part(nn.Module):
    """``w`` and ``v``, and an ``empty`` parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.empty = nn.Parameter(torch.ones(0))


def attached(model: Part, names: str) -> None:
    kept = pack(torch.tensor([True, False, True, False]))
    mask = ParamMask(bits=dict.fromkeys(names, kept), shapes=dict.fromkeys(names, (4,)))
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = MaskedAdamW(trained, lr=0.5)
    attach(model, optimizer, mask)
    (model.w.sum() + model.v.sum()).backward()
    optimizer.step()


@pytest.mark.parametrize("names", ["w", "wv"])
def test_attach_to_a_part_that_is_frozen(names: str):
    """Frozen by its architecture, so the ticket lacks it; or by its user."""
    model = Part()
    model.v.requires_grad_(False)
    attached(model, names)
    assert (model.w == 1).tolist() == [False, True, False, True]
    assert model.v.tolist() == [1.0] * 4


def test_attach_to_what_the_ticket_does_not_name():
    """transformers loads a frozen parameter as trainable."""
    way_out = (
        r"'v' is of shape \[4\] in the model and missing in the ticket; freeze parameters outside"
    )
    with pytest.raises(UserError, match=way_out):
        attached(Part(), "w")
