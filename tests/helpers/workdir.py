"""A folder to work in: a small learnable corpus, its store, a recipe of a tiny model."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from tests.helpers import tiny
from tests.helpers.commands import Done, ok, run

BLOCK, STEPS = 32, 40
PREPARE = (
    "--input",
    "corpus.jsonl",
    "--train_vocab_size",
    "400",
    "--block_size",
    str(BLOCK),
    "--val_fraction",
    "0.05",
)
RECIPE = f"""\
run: {{name: main, val_every: 10, val_blocks: 32, checkpoint_every: 10}}
model: {{hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, intermediate_size: 48,
        max_positions: 64}}
data: {{store: store}}
mask: {{iou_threshold: 0.9, patience: 8, max_steps: 30}}
train: {{steps: {STEPS}, global_batch_size: 8, micro_batch_size: 2, precision: fp32, lr: 1.0e-2,
        warmup_steps: 4, min_lr_ratio: 0.1, weight_decay: 0.1}}
"""
SHORT = ("--train.steps", "6", "--run.val_every", "6", "--run.checkpoint_every", "3")


def write_corpus(path: Path, documents: int = 400, words: int = 80) -> None:
    """Write JSON lines of invented words; the next word mostly follows from the last."""
    chance = random.Random(0)
    firsts = ["ka", "lo", "mi", "ne", "su", "ta", "vo", "zi"]
    seconds = ["na", "re", "to", "li", "du"]
    names = [first + second for first in firsts for second in seconds]
    lines = []
    for _ in range(documents):
        word, text = chance.randrange(len(names)), []
        for _ in range(words):
            text.append(names[word])
            word = (word * 3 + chance.choices([1, 2, 5], [6, 3, 1])[0]) % len(names)
        lines.append(json.dumps({"text": " ".join(text) + "."}))
    path.write_text("\n".join(lines))


def furnish(folder: Path, do: Callable[..., Done] = run) -> Done:
    """Fill ``folder``: corpus.jsonl, store/, tiny.yaml, zero0.json to zero3.json. ``do`` runs the
    command, in a fresh process or in this one."""
    write_corpus(folder / "corpus.jsonl")
    (folder / "tiny.yaml").write_text(RECIPE)
    for stage in range(4):
        (folder / f"zero{stage}.json").write_text(json.dumps(tiny.ds_json(stage)))
    return ok(do("prepare_data.py", *PREPARE, "--out", "store", cwd=folder))
