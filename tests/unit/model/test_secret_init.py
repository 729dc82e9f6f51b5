"""Initial weights: the model's distribution from a key, exact bits, a stable key."""

import hashlib
import hmac
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as hf_init

from pmp_ds.errors import UserError
from pmp_ds.model import random_fill, secret_init
from pmp_ds.model.build import build_model
from pmp_ds.model.keys import Secret, create_key, derive, load_key
from pmp_ds.model.parameters import weights_digest
from pmp_ds.model.secret_init import initialize
from pmp_ds.model.stream import normals

KEY = Secret(bytes(range(32)))
# Of gpt2() from KEY. It changes only when transformers initialises GPT-2 otherwise.
GOLDEN_GPT2 = "7753805d9bd32c54f51fad2d5f706062cc4d758c38b857af93ad73cde8b4456c"
REPO = Path(__file__).resolve().parents[3]


def llama(tied: bool = False) -> PreTrainedModel:
    return build_model(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> PreTrainedModel:
    return build_model(
        GPT2Config(
            vocab_size=256,
            n_embd=64,
            n_layer=8,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# The key.


def test_key_is_created_once_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "init"
    key = create_key(folder)
    assert len(key) == 32
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert load_key(folder) == create_key(folder) == key == (folder / "key").read_bytes()
    assert os.listdir(folder) == ["key"]
    assert create_key(tmp_path / "other") != key


def test_damaged_key_is_an_error_that_does_not_show_it(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"SECRET")
    with pytest.raises(UserError, match="has 6 bytes, but a key has 32") as caught:
        load_key(tmp_path)
    assert "SECRET" not in str(caught.value)


def test_missing_key_is_not_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="key is missing: restore the run's own key"):
        load_key(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r}".format, lambda k: f"{[k]}"])
def test_key_does_not_show_itself(show: Any) -> None:
    key = Secret(b"secret-secret-secret-secret-3210")
    for value in (key, derive(key, "x")):
        assert "Secret(<32 bytes>)" in show(value)
        assert "secret-" not in show(value)
        assert "\\x" not in show(value)


def test_derive_is_hkdf_sha256() -> None:
    extracted = hmac.digest(b"pmp-ds v1", KEY, hashlib.sha256)
    expected = hmac.digest(extracted, b"warm-up order\x01", hashlib.sha256)
    assert derive(KEY, "warm-up order") == expected
    assert derive(KEY, "random mask") != expected


# The weights.


@pytest.mark.parametrize("tied", [False, True])
def test_llama_has_its_own_distribution(tied: bool) -> None:
    model = llama(tied)
    before = weights(model)
    initialize(model, KEY)
    for name, value in weights(model).items():
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            assert not torch.equal(value, before[name])
            assert abs(float(value.mean())) < 4 * 0.02 / math.sqrt(value.numel()), name
            assert abs(float(value.std()) / 0.02 - 1) < 4 / math.sqrt(2 * value.numel()), name
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_weights_are_the_stream_of_their_name() -> None:
    model = llama()
    initialize(model, KEY)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        value = model.get_parameter(name).detach()
        stream = normals(derive(KEY, f"init/0/{name}"), 0, value.numel()) * 0.02
        assert torch.equal(value.flatten(), torch.from_numpy(stream).float())


def test_tied_weight_is_drawn_once_and_is_the_untied_embedding() -> None:
    tied, untied = llama(True), llama(False)
    initialize(tied, KEY)
    initialize(untied, KEY)
    expected = weights(untied)
    del expected["lm_head.weight"]
    assert weights(tied).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights(tied).items())


def test_gpt2_scales_the_residual_projections() -> None:
    model = gpt2()
    initialize(model, KEY)
    for name, value in weights(model).items():
        if name.endswith("bias"):
            assert torch.equal(value, torch.zeros_like(value)), name
        elif "ln_" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert abs(float(value.std()) / std - 1) < 4 / math.sqrt(2 * value.numel()), name


def test_no_two_tensors_share_a_stream() -> None:
    model = llama()
    initialize(model, KEY)
    drawn = [v.flatten()[:64] for n, v in weights(model).items() if "norm" not in n]
    overlap = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0).abs().max()
    assert float(overlap) < 0.6  # 8 standard errors would be 1; equal streams give 1
    other = llama()
    initialize(other, derive(KEY, "another"))
    assert weights_digest(other) != weights_digest(model)


@pytest.mark.processes
def test_bits_depend_on_the_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not depend on the state before, the chunks, torch's seed, the threads or the
    process."""
    model = gpt2()
    initialize(model, KEY)
    digest = weights_digest(model)
    assert digest == GOLDEN_GPT2
    monkeypatch.setattr(secret_init, "CHUNK", 1000)
    monkeypatch.setattr(random_fill, "CHUNK", 700)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    initialize(model, KEY)
    assert weights_digest(model) == digest
    assert torch.equal(torch.get_rng_state(), state)
    program = (
        "from tests.unit.model.test_secret_init import *\n"
        "model = gpt2(); initialize(model, KEY); print(weights_digest(model))"
    )
    threads = "1" if torch.get_num_threads() > 1 else "2"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == digest, done.stderr


@pytest.mark.parametrize("build", [llama, gpt2])
def test_public_seed_is_what_from_config_gives(build: Any) -> None:
    model = build()
    state = torch.get_rng_state()
    initialize(model, 42)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        expected = AutoModelForCausalLM.from_config(model.config)
    assert weights_digest(model) == weights_digest(expected)


# Initialisations that the tiny models above do not have.


class OddConfig(PreTrainedConfig):
    model_type = "odd"


class Odd(PreTrainedModel):
    """Truncated and uniform fills, a padding row, a part of a tensor, a constructor's constant."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(50, 8, padding_idx=3)
        self.cut = nn.Parameter(torch.rand(100, 100))
        self.even = nn.Parameter(torch.rand(100, 100))
        self.parts = nn.Parameter(torch.rand(6, 4))
        self.gain = nn.Parameter(torch.full((5,), 2.5))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            hf_init.trunc_normal_(self.cut, std=0.5, a=-0.25, b=1.0)
            hf_init.uniform_(self.even, -3.0, 5.0)
            hf_init.normal_(self.parts[:, :2])
            hf_init.normal_(self.parts[:, 2:], mean=100.0)


def test_every_kind_of_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd(OddConfig())
    initialize(model, KEY)
    assert torch.equal(model.gain, torch.full((5,), 2.5))
    assert not model.embed.weight[3].any()
    assert model.embed.weight[2].all()
    cut, even = model.cut.detach(), model.even.detach()
    unit = NormalDist()
    mean = 0.5 * (unit.pdf(-0.5) - unit.pdf(2.0)) / (unit.cdf(2.0) - unit.cdf(-0.5))
    assert -0.25 < cut.min() < -0.24
    assert 0.99 < cut.max() < 1.0
    assert abs(float(cut.mean()) - mean) < 4 * float(cut.std()) / 100
    assert -3.0 < even.min() < -2.99
    assert 4.99 < even.max() < 5.0
    assert abs(float(even.mean()) - 1.0) < 4 * 8 / math.sqrt(12) / 100
    assert model.parts[:, :2].abs().max() < 10 < 90 < model.parts[:, 2:].min()
    digest = weights_digest(model)
    monkeypatch.setattr(secret_init, "CHUNK", 64)
    monkeypatch.setattr(random_fill, "CHUNK", 64)
    initialize(model, KEY)
    assert weights_digest(model) == digest


def test_a_parameter_left_at_public_values_is_an_error() -> None:
    class Forgets(Odd):
        def _init_weights(self, module: nn.Module) -> None:
            if module is not self:
                super()._init_weights(module)

    with pytest.raises(UserError, match=r"Forgets does not initialise all of cut .*init.seed"):
        initialize(Forgets(OddConfig()), KEY)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (hf_init.orthogonal_, "a tensor other than a parameter with aten.normal_"),
        (lambda p: p.data.exponential_(), "draws with aten.exponential_"),
        (lambda p: p.data.copy_(torch.rand(100, 100)), "draws with aten.rand"),
        (lambda p: hf_init.trunc_normal_(p, a=20.0, b=30.0), "hardly ever falls inside"),
    ],
)
def test_other_random_operations_are_errors(
    draw: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Odd(OddConfig())
    monkeypatch.setattr(Odd, "_init_weights", lambda self, module: draw(self.cut))
    with pytest.raises(UserError, match=message):
        initialize(model, KEY)
    assert hf_init.TORCH_INIT_FUNCTIONS["trunc_normal_"] is nn.init.trunc_normal_
