"""A released tiny Llama with a tokenizer of its own, a store of its text, and a ticket."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pmp_ds.data.arrow_store import write_shard
from pmp_ds.data.manifest import write_manifest
from pmp_ds.evaluate.subject import Subject
from pmp_ds.prepare.tokenizer import train_tokenizer
from pmp_ds.ticket.mask import ParamMask, pack
from tests.helpers import tiny

TEXT = "the cat sat on a mat and then ran to buy red fish from that old man who sold"


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 weights of tiny.LLAMA and a BPE tokenizer of VOCAB ids."""
    folder = tmp_path_factory.mktemp("evaluate") / "release"
    tiny.model().save_pretrained(folder)
    train_tokenizer([TEXT] * 20, tiny.VOCAB).save_pretrained(folder)
    return folder


@pytest.fixture
def subject(release: Path) -> Subject:
    return Subject.open(release)


@pytest.fixture(scope="session")
def mask(release: Path) -> ParamMask:
    return random_mask(tiny.model())


def random_mask(model: PreTrainedModel) -> ParamMask:
    """Density 0.7; norms kept whole, as always_train does."""
    generator = torch.Generator().manual_seed(0)
    bits, shapes = {}, {}
    for name, param in model.named_parameters():
        kept = torch.rand(param.numel(), generator=generator) < 0.7
        bits[name] = pack(kept | torch.tensor(param.ndim == 1))
        shapes[name] = tuple(param.shape)
    return ParamMask(bits=bits, shapes=shapes)


def write_store(folder: Path, release: Path, blocks: int = 5, vocab: int = tiny.VOCAB) -> Path:
    """Random ids below ``vocab`` in blocks of BLOCK, with the tokenizer of ``release``."""
    from pmp_ds.prepare.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(release))
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = np.random.default_rng(0).integers(3, vocab, (blocks, tiny.BLOCK)).astype(np.uint16)
    splits = {}
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        shards = [write_shard(folder, split, "00000-000.arrow", ids)]
        splits[split] = {"blocks": blocks, "documents": 1, "dropped_tokens": 0, "shards": shards}
    write_manifest(
        folder,
        {
            "block_size": tiny.BLOCK,
            "dtype": "uint16",
            "vocab_size": vocab,
            "eos_id": 2,
            "tokenizer": {"fingerprint": tokenizer.fingerprint},
            "unigram_cross_entropy": 5.0,
            "splits": splits,
            "settings": {},
        },
    )
    return folder


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return path
