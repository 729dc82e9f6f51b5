"""Fine-tuning on kept ranks: a small released model, its ticket, and the result."""

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pmp_ds import dist
from pmp_ds.cli import parse
from pmp_ds.config import MaskConfig, ModelConfig
from pmp_ds.discover.discover import random_ticket
from pmp_ds.finetune import sweep
from pmp_ds.finetune.config import FinetuneConfig
from pmp_ds.model.build import build_model, model_config
from pmp_ds.model.keys import Secret
from pmp_ds.model.parameters import parameter_table
from pmp_ds.model.secret_init import initialize
from pmp_ds.results import Result
from pmp_ds.run_dir import RunDir
from pmp_ds.ticket.ticket import save_ticket
from tests.helpers import tiny
from tests.helpers.glue import byte_tokenizer

LLAMA = tiny.LLAMA
GPT2 = tiny.GPT2


def write_model(folder: Path, config: ModelConfig = LLAMA, padding: int = 0) -> None:
    """Write ``folder``/release, a model of bytes, and ``folder``/ticket of 70% of it. With
    ``padding`` the ticket has that many more rows of embeddings than the release."""
    tokenizer = byte_tokenizer()
    hf_config = model_config(
        config, vocab_size=len(tokenizer) + padding, eos_id=0, bos_id=None, block_size=32
    )
    model = build_model(hf_config)
    initialize(model, Secret(b"k" * 32))
    ticket = random_ticket(b"t" * 32, MaskConfig(source="random"), parameter_table(model))
    folder.mkdir(parents=True, exist_ok=True)
    save_ticket(ticket, folder / "ticket")
    if padding:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.bfloat16().save_pretrained(folder / "release")
    tokenizer.save_pretrained(folder / "release")


def tune(
    folder: str,
    flags: list[str],
    sweeps: tuple[str, ...] = (),
    stage: int = 1,
    keep: bool = True,
    afresh: bool = False,
) -> list[Result]:
    """Run launcher/finetune.py, after its process group is made, on the model of
    ``write_model``."""
    torch.manual_seed(0)
    home = Path(folder)
    common = ["--model", f"{home}/release", "--run.root", f"{home}/runs", *flags]
    cells = {
        name: parse(FinetuneConfig, [*common, *more])[0]
        for name, more in sweep.cells(sweep.grid(sweeps)).items()
    }
    first = next(iter(cells.values()))
    run = RunDir(home / "runs" / first.run.name)
    return sweep.run_all(
        cells,
        tiny.ds_json(stage),
        run,
        run.root / "results.jsonl",
        time.monotonic(),
        keep_models=keep,
        start_afresh=afresh,
    )


def problem(folder: str, flags: list[str], sweeps: tuple[str, ...] = (), stage: int = 1) -> str:
    """Return the error with which ``tune`` refuses these arguments."""
    from pmp_ds.errors import UserError

    try:
        tune(folder, flags, sweeps, stage)
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a Hugging Face folder in fp32."""
    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return {name: tensor.float() for name, tensor in found.items()}


def world() -> int:
    return dist.world_size()
