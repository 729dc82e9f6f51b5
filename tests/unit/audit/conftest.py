"""Releases with a known mask: theta(0), and larger noise on the kept elements."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pmp_ds.audit.attack import Attack, run_attacks
from pmp_ds.audit.case import Case, Weights
from pmp_ds.audit.report import ATTACKS
from pmp_ds.model.build import build_model, model_config
from pmp_ds.model.keys import Secret
from pmp_ds.model.secret_init import initialize
from pmp_ds.ticket.mask import ParamMask, pack
from tests.helpers import tiny

DENSITY = 0.7
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Made:
    """A release, the theta(0) it came from (fp32), and its mask."""

    folder: Path
    initial: Tensors
    tensors: Tensors
    mask: ParamMask

    def save(self, folder: Path, tensors: Tensors) -> Weights:
        return save(folder, tensors)

    def case(self, **options: object) -> Case:
        return Case(release=Weights.open(self.folder), mask=self.mask, **options)  # type: ignore[arg-type]


def save(folder: Path, tensors: Tensors, vocab_size: int = tiny.VOCAB) -> Weights:
    folder.mkdir(exist_ok=True)
    config = model_config(
        tiny.LLAMA, vocab_size=vocab_size, eos_id=2, bos_id=None, block_size=tiny.BLOCK
    )
    config.save_pretrained(folder)
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return Weights.open(folder)


def random_mask(initial: Tensors, seed: int, *, constants: bool = True) -> ParamMask:
    generator = torch.Generator().manual_seed(seed)
    kept = {
        name: torch.ones(tensor.numel(), dtype=torch.bool)
        if tensor.ndim == 1 and constants
        else torch.rand(tensor.numel(), generator=generator) < DENSITY
        for name, tensor in initial.items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
    return ParamMask(bits={name: pack(bits) for name, bits in kept.items()}, shapes=shapes)


def trained(initial: Tensors, mask: ParamMask, *, far: float = 0.02, seed: int = 1) -> Tensors:
    """Kept elements move by normal noise of standard deviation ``far``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(
            mask.full(name), value + far * torch.randn(value.shape, generator=generator), value
        )
        for name, value in initial.items()
    }


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    def made(
        init: Secret | int = Secret(b"k" * 32),  # noqa: B008
        *,
        name: str = "release",
        dtype: torch.dtype = torch.bfloat16,
        mask_seed: int = 0,
        constants: bool = True,
        far: float = 0.02,
    ) -> Made:
        model = build_model(
            model_config(
                tiny.LLAMA, vocab_size=tiny.VOCAB, eos_id=2, bos_id=None, block_size=tiny.BLOCK
            )
        )
        initialize(model, init)
        initial = {n: p.detach().clone() for n, p in model.named_parameters()}
        mask = random_mask(initial, mask_seed, constants=constants)
        tensors = {n: t.to(dtype) for n, t in trained(initial, mask, far=far).items()}
        save(tmp_path / name, tensors)
        return Made(tmp_path / name, initial, tensors, mask)

    return made


def run_one(name: str, case: Case) -> Any:
    """The `Result` of one attack."""
    attack: Attack = next(attack for attack in ATTACKS if attack.name == name)
    return next(run_attacks([attack], case))
