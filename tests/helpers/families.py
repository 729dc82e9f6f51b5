"""Every causal architecture of transformers at tiny width, from a config.json to a classifier.

    python -m tests.helpers.families              writes its part of docs/SUPPORT.md, in minutes
    python -m tests.helpers.families llama mpt    tests these and prints their rows

Each runs in its own process with a limit of time and memory, so that a crash becomes a row.
"""

import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed.ops  # once, before the forks: its muon imports torch's compiler, slowly
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pmp_ds import dist
from pmp_ds.config import MaskConfig, ModelConfig, TrainConfig
from pmp_ds.discover.discover import random_ticket
from pmp_ds.engine.engine import Engine
from pmp_ds.errors import UserError
from pmp_ds.finetune.config import FinetuneConfig, TuneDataConfig
from pmp_ds.finetune.methods import load_model, mask_of, open_ticket
from pmp_ds.finetune.tasks import Glue
from pmp_ds.model.build import build_model, model_config
from pmp_ds.model.folder_rules import first_line
from pmp_ds.model.keys import Secret
from pmp_ds.model.parameters import parameter_table
from pmp_ds.model.secret_init import initialize
from pmp_ds.model.shrink import VOCAB, shrunk
from pmp_ds.release import reload, verify
from pmp_ds.release.export import export
from pmp_ds.release.model_card import DerivativeFacts
from pmp_ds.release.rehearsal import rehearse
from pmp_ds.state.weight_files import save_all
from pmp_ds.ticket.ticket import save_ticket
from tests.helpers import tiny
from tests.helpers.glue import byte_tokenizer, write_glue
from tests.helpers.matrix import ARCHITECTURES, write

BLOCK, UPDATES = 16, 2
SECONDS, BYTES = 60, 12 << 30  # limits for one family
QUICK = ("bloom", "deepseek_v3", "gpt2", "gpt_neox", "llama", "mpt", "qwen3_moe")

# Values that the default config of a class lacks, and those that real models use.
NEEDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "head_dim": 24},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}


@dataclass
class Row:
    """Describe the outcome of a family; an empty column was not reached."""

    kind: str
    pretrained: str = ""
    released: str = ""
    tuned: str = ""

    def __str__(self) -> str:
        return f"| {self.kind} | {self.pretrained} | {self.released} | {self.tuned} |"


def tiny_config(kind: str) -> PreTrainedConfig:
    """Return the default architecture of a family at tiny width, for a vocabulary of bytes."""
    config = CONFIG_MAPPING[kind](**NEEDS.get(kind, {}))
    if getattr(config, "is_decoder", True) is False and kind != "gpt_neox":
        config.is_decoder = True
    return shrunk(config)


def trial(kind: str, folder: Path) -> Row:
    """Pretrain with a random ticket, release and fine-tune a family as the commands do."""
    row = Row(kind)
    try:
        config = _architecture(kind, folder)
        init, row.pretrained = _init(config)
    except UserError as error:
        row.pretrained = f"refused: {_reason(error)}"
        return row
    except Exception as error:  # noqa: BLE001 - what transformers itself cannot build
        row.pretrained = f"not tried: {first_line(error)}"
        return row
    _pretrain(config, folder, init)
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    with in_this_process():
        summary = export(
            folder / "weights",
            folder / "release",
            tokenizer_dir=folder / "tokenizer",
            card=DerivativeFacts(name="tiny", base="tiny", date="2026-01-31", license=None),
        )
    row.released = "same logits" if summary.logits_difference == 0 else "logits within rounding"
    try:
        tune(settings(folder))
        row.tuned = "yes"
    except UserError as error:
        row.tuned = f"refused: {_reason(error)}"
    return row


def _init(config: PreTrainedConfig) -> tuple[Secret | int, str]:
    """Return the source of the initial weights and its words for the table. Raises UserError where
    pretrain.py would refuse the architecture."""
    try:
        rehearse(config)
        return Secret(b"k" * 32), "yes"
    except UserError as error:
        if "init.seed" not in str(error):
            raise
        rehearse(config, secret=False)
        return 1, "with `init.seed` only"


def _architecture(kind: str, folder: Path) -> PreTrainedConfig:
    values = _for_bytes(tiny_config(kind).to_dict())
    (folder / "config.json").write_text(json.dumps(values))
    return model_config(
        ModelConfig(family="auto", path=str(folder)),
        vocab_size=len(byte_tokenizer()),
        eos_id=0,
        bos_id=None,
        block_size=BLOCK,
    )


def _for_bytes(values: dict[str, Any]) -> dict[str, Any]:
    """Resize every table of tokens, at any depth, to the vocabulary."""
    size = len(byte_tokenizer())
    return {
        key: _for_bytes(value)
        if isinstance(value, dict)
        else (size if value == VOCAB and "vocab" in str(key) else value)
        for key, value in values.items()
    }


def _pretrain(config: PreTrainedConfig, folder: Path, init: Secret | int) -> None:
    model = build_model(config)
    initialize(model, init)
    ticket = random_ticket(b"t" * 32, MaskConfig(source="random"), parameter_table(model))
    save_ticket(ticket, folder / "ticket")
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    engine = Engine(model, _train_config(UPDATES), tiny.ds_json(1))
    engine.arm(ticket.mask)
    for step in range(UPDATES):
        engine.backward(tiny.batch(step, 4)[:, :BLOCK] % config.vocab_size)
        engine.step(1e-2)
    after = dict(engine.parameters())
    changed = {name: after[name] != before[name] for name in ticket.mask.shapes}
    assert any(bool(where.any()) for where in changed.values())
    assert not any(bool((where & ~ticket.mask.full(n)).any()) for n, where in changed.items())
    (folder / "weights").mkdir()
    save_all(dict(chain(engine.parameters(), engine.constants())), config, folder / "weights")
    engine.close()


def _train_config(steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        global_batch_size=4,
        micro_batch_size=4,
        precision="fp32",
        lr=1e-2,
        warmup_steps=0,
    )


def settings(folder: Path) -> FinetuneConfig:
    """Return the settings to fine-tune ``folder``/release with ``folder``/ticket on a small GLUE
    task."""
    write_glue(folder / "glue", 8, 4)
    return FinetuneConfig(
        model=str(folder / "release"),
        task="sst2",
        method="ticket",
        ticket=str(folder / "ticket"),
        data=TuneDataConfig(glue_dir=str(folder / "glue")),
    )


def tune(config: FinetuneConfig) -> torch.Tensor:
    """Do one update of a classifier and return its logits on held-out rows."""
    task = Glue(config)
    ticket = open_ticket(config)
    model = load_model(config, task.num_labels)
    mask, _ = mask_of(config, ticket, model)
    engine = Engine(model, _train_config(1), tiny.ds_json(1), task.objective)
    engine.arm(mask)
    rows = torch.from_numpy(task.samples.gather(np.arange(4)))
    engine.backward(rows)
    engine.step(1e-2)
    logits = engine.predict(rows)
    engine.close()
    return logits


@contextmanager
def in_this_process() -> Iterator[None]:
    """Reload releases in this process: a fresh interpreter would take most of the time."""
    original = verify.run_alone
    actions = {"check": reload._check, "generate": reload._generate}
    verify.run_alone = lambda **request: actions[request["action"]](request)
    try:
        yield
    finally:
        verify.run_alone = original


def _reason(error: Exception) -> str:
    text = str(error).partition(" is not trained: ")[2] or str(error)
    text = re.sub(r"\S*/(family-|tmp)\w*/(fp32/weights/)?", "", " ".join(text.split()))
    return text.replace("|", "/")


def apart(kind: str) -> Row:
    """Run ``trial`` in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="family-"))
    answer = folder / "answer.json"
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
            signal.alarm(SECONDS)
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            dist.init()
            row = trial(kind, folder)
            answer.write_text(json.dumps(asdict(row)))
        except Exception as error:  # noqa: BLE001 - it is the row
            answer.write_text(
                json.dumps(
                    asdict(Row(kind, f"FAILED: {type(error).__name__}: {first_line(error)}"))
                )
            )
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    try:
        return Row(**json.loads(answer.read_text()))
    except FileNotFoundError:
        return Row(kind, f"FAILED: ended by signal {status} after at most {SECONDS} s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def section(rows: Sequence[Row]) -> str:
    """Return the part of docs/SUPPORT.md about architectures."""
    whole = sum(row.tuned == "yes" for row in rows)
    released = sum(bool(row.released) for row in rows)
    lines = [
        "",
        f"All {len(rows)} causal families of transformers {transformers.__version__} at tiny",
        "width, as tested by `make families`: pretrained from `model.family: auto` with a random",
        "ticket, exported, reloaded and compared, and fine-tuned as a classifier with the ticket.",
        f"{released} are pretrained and released, {whole} of them fine-tuned as classifiers. The",
        "others are refused with the reason before anything is trained, or are not tried because",
        "the defaults of transformers' own class do not describe a model.",
        "",
        "| family | pretrained | released | classifier |",
        "|---|---|---|---|",
        *map(str, rows),
    ]
    return ARCHITECTURES + "\n".join(lines) + "\n"


def main(kinds: Sequence[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    rows = []
    for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append(apart(kind))
        print(rows[-1], flush=True)
    if not kinds:
        write(section(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
