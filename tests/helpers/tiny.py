"""The smallest models and data that still exercise everything."""

from typing import Any

import torch
from transformers import PreTrainedModel

from pmp_ds.config import ModelConfig
from pmp_ds.model.build import build_model, model_config
from pmp_ds.model.keys import Secret
from pmp_ds.model.secret_init import initialize
from pmp_ds.run_dir import RunDir
from pmp_ds.state import theta0
from pmp_ds.state.run_record import load_config, read_data

VOCAB, BLOCK = 300, 32

LLAMA = ModelConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    max_positions=64,
)
LLAMA_TIED = ModelConfig(
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    intermediate_size=48,
    max_positions=64,
    tie_embeddings=True,
)
GPT2 = ModelConfig(
    family="gpt2",
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    max_positions=64,
    tie_embeddings=True,
)


def model(config: ModelConfig = LLAMA, key: bytes = b"k" * 32) -> PreTrainedModel:
    built = build_model(
        model_config(config, vocab_size=VOCAB, eos_id=2, bos_id=None, block_size=BLOCK)
    )
    initialize(built, Secret(key))
    return built


def at_theta0(run: RunDir) -> PreTrainedModel:
    """Return a run's whole model at theta(0), drawn again from its key."""
    config = load_config(run)
    built = build_model(theta0.architecture(config, read_data(run), run))
    initialize(built, theta0.init_of(run, config))
    return built


def ds_json(stage: int) -> dict[str, Any]:
    """Return buckets and thresholds so small that even a tiny model takes all of DeepSpeed's
    paths."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 5000}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 100,
            "stage3_prefetch_bucket_size": 2000,
            "sub_group_size": 20000,
        }
    return {"zero_optimization": zero}


def batch(step: int, size: int) -> torch.Tensor:
    """Return (size, BLOCK) int64 of update ``step``: tokens with a skewed, learnable
    distribution."""
    generator = torch.Generator().manual_seed(1000 + step)
    rolls = torch.rand(size, BLOCK, generator=generator)
    return (rolls.pow(3) * VOCAB).long()


class RepeatedLoader:
    """Give every rank the same micro-batch, so that the reduced gradient is the same to the bit for
    any power-of-two number of ranks times accumulation steps."""

    def __init__(self, micro_batch_size: int, accumulation_steps: int) -> None:
        self._size, self._repeats, self._step = micro_batch_size, accumulation_steps, 0

    def next(self) -> torch.Tensor:
        self._step += 1
        return batch(self._step, self._size).repeat(self._repeats, 1)
