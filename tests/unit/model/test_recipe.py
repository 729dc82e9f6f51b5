"""theta(0) by slices is theta(0) drawn whole, for every family; what no recipe says is named."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as hf_init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pmp_ds.errors import UserError
from pmp_ds.model import initial as initial_module
from pmp_ds.model.build import build_model
from pmp_ds.model.initial import Initial, cut, digest_of
from pmp_ds.model.keys import Secret
from pmp_ds.model.parameters import parameter_table, weights_digest
from pmp_ds.model.recipe import NotDescribedError, Recipe, describe
from pmp_ds.model.secret_init import initialize
from tests.helpers import tiny
from tests.helpers.families import tiny_config
from tests.helpers.tiers import daily
from tests.unit.model.test_secret_init import Odd, OddConfig

KEY = Secret(bytes(range(32)))
DAILY = ("llama", "gpt2", "mixtral", "deepseek_v3", "falcon_h1", "roformer", "xlstm", "mpt")
DRAWN_WHOLE = {"bailing_hybrid", "hy_v4", "kimi_linear", "xlstm"}
"""They copy numbers that they compute from the parameter's own shape on its device."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize("kind", daily(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), DAILY))
def test_slices_are_those_of_the_whole(kind: str) -> None:
    try:
        config = tiny_config(kind)
        whole = build_model(copy.deepcopy(config))
        initialize(whole, KEY)
    except Exception as error:  # noqa: BLE001 - docs/SUPPORT.md has the reason
        pytest.skip(f"{kind} does not start from a key at tiny width: {error!s:.60}")
    initial = Initial(config, KEY)
    assert (initial.reason is not None) == (kind in DRAWN_WHOLE), initial.reason
    assert initial.table == parameter_table(whole)
    for name, param in whole.named_parameters():
        flat = param.detach().reshape(-1)
        for start, count in ((0, flat.numel()), (flat.numel() // 3, flat.numel() // 2)):
            found = initial.read(name, start, count)
            assert torch.equal(found, flat[start : start + count]), name
    skeleton = initial.model()
    for (name, buffer), (same, expected) in zip(
        skeleton.named_buffers(), whole.named_buffers(), strict=True
    ):
        assert name == same
        assert torch.equal(buffer, expected), name
    assert all(param.is_meta for param in skeleton.parameters()) == (initial.reason is None)


def odd_recipes(monkeypatch: pytest.MonkeyPatch, init: Any) -> dict[str, Recipe]:
    """Of the model with odd fills, initialised in another way."""
    monkeypatch.setattr(Odd, "_init_weights", init)
    build = "pmp_ds.model.recipe.AutoModelForCausalLM.from_config"
    monkeypatch.setattr(build, lambda config, dtype: Odd(config))
    return describe(OddConfig())[1]


def plainly(self: PreTrainedModel, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        hf_init.normal_(module.weight)
        hf_init.zeros_(module.weight[3])
    if module is self:
        hf_init.trunc_normal_(self.cut, std=0.5, a=-0.25, b=1.0)
        hf_init.uniform_(self.even, -3.0, 5.0)
        hf_init.normal_(self.parts)
        self.get_parameter("parts").data[2:4].copy_(torch.arange(8.0).view(2, 4))
        self.get_parameter("parts").data[5].fill_(torch.tensor(7.0))


def test_every_kind_of_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = odd_recipes(monkeypatch, plainly)
    model = Odd(OddConfig())
    initialize(model, KEY)
    for name, param in model.named_parameters():
        assert torch.equal(recipes[name].slice(KEY, 0, param.numel()), param.detach().view(-1))
        assert recipes[name].constant == (name == "gain")
    parts = model.get_parameter("parts")
    assert parts[3].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert parts[5].tolist() == [7.0] * 4
    assert not model.get_parameter("embed.weight")[3].any()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p: p.data.exponential_(), "draws with aten.exponential_"),
        (lambda p: p.data.copy_(torch.rand(100, 100)), "draws with aten.rand"),
        (lambda p: p.data.mul_(2.0), "calls aten.mul_.Tensor on cut"),
        (lambda p: p.data[:, ::2].normal_(), "every other element of cut"),
        (lambda p: torch.zeros(3).normal_(), "a tensor that is no parameter"),
        (lambda p: None, "nothing fills all of"),
    ],
)
def test_what_is_no_recipe_is_named(
    draw: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(self: Any, module: nn.Module) -> None:
        if module is self:
            draw(self.cut)

    with pytest.raises(NotDescribedError, match=message):
        odd_recipes(monkeypatch, init)
    assert hf_init.TORCH_INIT_FUNCTIONS["trunc_normal_"] is nn.init.trunc_normal_


def test_bounds_that_nothing_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = odd_recipes(
        monkeypatch,
        lambda self, module: [
            hf_init.trunc_normal_(param, a=20.0, b=30.0) for param in module.parameters()
        ],
    )
    with pytest.raises(UserError, match="hardly ever falls inside"):
        recipes["cut"].slice(KEY, 0, 10)


def test_digest_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of ranks, and a whole draw, compute the same; another key another."""
    monkeypatch.setattr(initial_module, "_DIGEST_CHUNK", 1000)
    config = tiny.model().config
    described, seed = Initial(config, KEY), Initial(config, 5)
    expected = digest_of([described.chunk_digests()])
    for world in (2, 3, 50):
        parts = [described.chunk_digests((rank, world)) for rank in range(world)]
        assert digest_of(parts) == expected
        assert len({number for part in parts for number in part}) == len(
            list(cut(described._trained, 1000))
        )
    assert digest_of([Initial(config, Secret(b"x" * 32)).chunk_digests()]) != expected
    model = build_model(config)
    initialize(model, KEY)
    assert described.older_digest() == weights_digest(model)
    initialize(model, 5)
    assert seed.older_digest() == weights_digest(model)
    assert seed.reason == "init.seed draws from one sequence of numbers"


def test_a_public_seed_is_drawn_whole_and_freed() -> None:
    initial = Initial(tiny.model().config, 5)
    whole = dict(initial.model().named_parameters())
    for info in initial.table:
        found = initial.read(info.name, 0, info.numel)
        assert torch.equal(found, whole[info.name].detach().view(-1))
    assert initial._whole is not None
    initial.forget()
    assert initial._whole is None
