"""theta(0), the initial weights of a run: drawn from its secret key or public seed, again and again
the same bits."""


import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pmp_ds import dist
from pmp_ds.config import Config
from pmp_ds.errors import UserError
from pmp_ds.model.build import build_model, model_config
from pmp_ds.model.parameters import ParamInfo, digest, weights_digest
from pmp_ds.model.secret_init import Secret, initialize, load_or_create_key
from pmp_ds.run_dir import RunDir, read_json, write_json
from pmp_ds.train.run_facts import DataFacts

_FILE = "theta0.json"
Init = Secret | int  # a key, or the public seed of paper mode


def architecture(config: Config, data: DataFacts) -> PreTrainedConfig:
    """The Hugging Face config; UserError when model and data do not fit together."""
    return model_config(
        config.model,
        vocab_size=data.vocab_size,
        eos_id=data.eos_id,
        bos_id=data.bos_id,
        block_size=data.block_size,
    )


def model_digest(config: Config, data: DataFacts) -> str:
    """``parameters.digest`` of the configured model, without drawing a weight."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(config, data))
    return digest(
        [ParamInfo(n, tuple(p.shape), p.numel(), 0, False) for n, p in model.named_parameters()]
    )


def init_of(run: RunDir, config: Config) -> Init:
    """What theta(0) is drawn from; rank 0 makes the key at the first call. Collective."""
    if config.init.seed is not None:
        return config.init.seed
    return Secret(dist.on_rank0(lambda: bytes(load_or_create_key(run.init))))


def draw(config: Config, data: DataFacts, init: Init) -> PreTrainedModel:
    """The configured model at theta(0), fp32 on CPU."""
    model = build_model(architecture(config, data))
    initialize(model, init)
    return model


def check(run: RunDir, model: PreTrainedModel) -> None:
    """Remember the digest of theta(0), or raise UserError when it is not the remembered one."""
    path, found = run.init / _FILE, weights_digest(model)
    if not path.exists():
        write_json(path, {"sha256": found}, private=True)
    elif read_json(path).get("sha256") != found:
        raise UserError(
            f"theta(0) drawn again differs from the one that {path} remembers: the key or the "
            "seed was changed, or this version of transformers builds another model; use what the "
            "run was started with"
        )


def lineage(run: RunDir) -> str:
    """The digest of theta(0): of which initial weights a run's checkpoints are. Private."""
    path = run.init / _FILE
    try:
        return str(read_json(path)["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}): put it back from a backup, or let "
            "launcher/pretrain.py write it again; without it no release can be recorded"
        ) from None
