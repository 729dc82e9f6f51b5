"""Folders for `init.weights`: a tiny model with the weights of no initialisation."""

from pathlib import Path

import torch

from pmp_ds.config import ModelConfig
from pmp_ds.data.arrow_store import Store
from pmp_ds.model.build import build_model, model_config
from tests.helpers import tiny


def write_base(
    folder: Path,
    store: Path,
    config: ModelConfig = tiny.LLAMA,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shards: bool = True,
) -> dict[str, torch.Tensor]:
    """Write a model for the data of ``store`` and return its parameters, in ``dtype``."""
    data = Store.open(store)
    hf_config = model_config(
        config,
        vocab_size=data.vocab_size,
        eos_id=data.eos_id,
        bos_id=data.bos_id,
        block_size=data.block_size,
    )
    generator = torch.Generator().manual_seed(seed)
    model = build_model(hf_config)
    with torch.no_grad():
        for param in model.parameters():
            noise = 0.05 * torch.randn(param.shape, generator=generator)
            param.copy_(noise + (param.ndim == 1))
    model.to(dtype).save_pretrained(folder, max_shard_size="30KB" if shards else "1GB")
    assert (folder / "model.safetensors.index.json").is_file() is shards
    return {name: param.detach().clone() for name, param in model.named_parameters()}
