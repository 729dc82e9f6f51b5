"""Three tiny releases, made from the project's own files, and their expected results.

    release = make(Path(".clients/releases"), "llama")

Next to `release/` is expected.json: token ids of texts, logits after the first, and greedy
continuations, by the transformers installed here, in fp32. It is written last: a release without it
is incomplete, and is made again, as is one made from other files than today's.
"""

import hashlib
import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pmp_ds.config import ModelConfig
from pmp_ds.data.arrow_store import Store
from pmp_ds.model.build import build_model, model_config
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.prepare import prepare
from pmp_ds.release.export import export
from pmp_ds.release.model_card import CardFacts
from pmp_ds.state.weight_files import save_all
from tests.helpers.distributed import REPO

BLOCK, UPDATES, NEW_TOKENS = 64, 200, 12
TEXTS = (
    "The ledger remembers what has left",
    "def main(argv: list[str] | None = None) -> None:\n    args = parse(argv)\n",
    "naïve café — déjà vu, 1,234 times:\t日本 ✓",
    "  two spaces  before, and a line end after\n",
    "A",
)


@dataclass(frozen=True)
class Kind:
    """Describe how one release is made."""

    model: ModelConfig
    tokenizer: Literal["trained", "gpt2", "llama"]
    """`trained` by prepare_data, or supplied: byte-level BPE, or a sentencepiece model."""

    bos: Literal["none", "document"]


_LLAMA = ModelConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=128,
    max_positions=128,
)
_GPT2 = ModelConfig(
    family="gpt2",
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    max_positions=128,
    tie_embeddings=True,
)
KINDS = {
    "llama": Kind(_LLAMA, "trained", "none"),
    "gpt2": Kind(_GPT2, "gpt2", "none"),
    "llama-bos": Kind(replace(_LLAMA, rope_theta=500_000.0), "llama", "document"),
}


def make(folder: Path, name: str) -> Path:
    """Make the release ``name`` of KINDS in ``folder``/NAME, unless it exists; return it."""
    kind, place = KINDS[name], folder / name
    release, expected = place / "release", place / "expected.json"
    texts = _texts()
    made_of = hashlib.sha256("\0".join((transformers.__version__, *texts)).encode()).hexdigest()
    if _made_of(expected) == made_of:
        return release
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    corpus = place / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    prepare(
        PrepareConfig(
            input=(str(corpus),),
            out=str(place / "store"),
            block_size=BLOCK,
            bos=kind.bos,
            tokenizer=_tokenizer(place, kind.tokenizer, texts),
            train_vocab_size=1000,
            val_fraction=0.05,  # of 236 texts, so that no edit of one leaves the split empty
            workers=1,
        )
    )
    store = Store.open(place / "store")
    config = model_config(
        kind.model,
        vocab_size=store.vocab_size,
        eos_id=store.eos_id,
        bos_id=store.bos_id,
        block_size=BLOCK,
    )
    torch.manual_seed(0)
    model = build_model(config)
    loss = _train(model, store)
    (place / "weights").mkdir()
    parameters = {name: param.detach() for name, param in model.named_parameters()}
    save_all(parameters, model.config, place / "weights")
    card = CardFacts(
        name=name,
        secrecy="none",
        tokens=UPDATES * 16 * BLOCK,
        updates=UPDATES,
        global_batch_size=16,
        block_size=BLOCK,
        schedule="AdamW",
        val_loss=loss,
        dataset_sources=("pmp-ds",),
        data_description="The project's own files.",
        date="2026-01-31",
    )
    export(
        place / "weights",
        release,
        tokenizer_dir=store.tokenizer_dir,
        card=card,
        vocab_size=store.vocab_size,
        leading_bos=store.bos_id is not None,
    )
    whole = json.dumps(_expected(release) | {"made_of": made_of})
    expected.write_text(whole, encoding="utf-8")
    return release


def _texts() -> list[str]:
    """Return the corpus: the sources and documents that make the releases, without the table of
    clients."""
    files = [
        Path(__file__),
        *sorted((REPO / "pmp_ds").rglob("*.py")),
        *(file for file in sorted((REPO / "docs").glob("*.md")) if file.name != "RELEASE.md"),
    ]
    return [text for file in files if (text := file.read_text(encoding="utf-8"))]


def _made_of(expected: Path) -> str | None:
    """Return the sources of a finished release; None for an unfinished one."""
    try:
        return str(json.loads(expected.read_text(encoding="utf-8"))["made_of"])
    except (OSError, ValueError, KeyError):
        return None


def _tokenizer(place: Path, kind: str, texts: list[str]) -> str | None:
    """Write a tokenizer as others make them into ``place``; None for one that prepare_data
    trains."""
    if kind == "gpt2":
        from tokenizers import ByteLevelBPETokenizer
        from transformers import GPT2Tokenizer

        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(texts, 1000, show_progress=False)
        folder = place / "tokenizer"
        folder.mkdir()
        trained.save_model(str(folder))
        files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
        GPT2Tokenizer(*files).save_pretrained(folder)
        return str(folder)
    if kind == "llama":
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in texts for line in text.splitlines()),
            model_writer=model,
            model_type="bpe",
            vocab_size=1000,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=1,
            minloglevel=2,
        )
        (place / "llama.model").write_bytes(model.getvalue())
        return str(place / "llama.model")
    return None


def _train(model: PreTrainedModel, store: Store) -> float:
    """Train every parameter, in plain torch: enough for greedy continuations without ties."""
    blocks = store.split("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chance = np.random.default_rng(0)
    for _ in range(UPDATES):
        rows = blocks.gather(chance.integers(len(blocks), size=16))
        ids = torch.from_numpy(rows.astype(np.int64))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _expected(release: Path) -> dict[str, object]:
    model = AutoModelForCausalLM.from_pretrained(release, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(release)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    greedy = []
    for each in ids:
        given = torch.tensor([each])
        output = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        greedy.append(output[0, len(each) :].tolist())
    with torch.inference_mode():
        logits = model(torch.tensor([ids[0]])).logits[0]  # (T, V)
    return {"texts": TEXTS, "ids": ids, "logits": logits.tolist(), "greedy": greedy}
