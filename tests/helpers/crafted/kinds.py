"""Kinds of untrusted files: a valid folder of each kind, and the code that opens it."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from pmp_ds.data.arrow_store import Store
from pmp_ds.data.mixed_store import Part
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.prepare import prepare
from pmp_ds.run_dir import LEDGER, RunDir, write_json
from pmp_ds.ticket import keys, vault
from pmp_ds.ticket.ticket import MANIFEST_FILE, MASK_FILE, load_ticket
from tests.helpers import odd_settings, study, tiny
from tests.helpers.crafted import corpora
from tests.helpers.glue import byte_tokenizer, write_rows
from tests.helpers.stores import write_store
from tests.helpers.strangers import packed, ticket_files

SHAPES = {"w": (3, 5), "b": (8,)}
IDENTITY = "AGE-SECRET-KEY-14RFYPJ2ZWYSC3H8Q308WV64DV6EEEFQAM7377JTCA547EFA66DQSH8GCQW"
SEALED = "copy.age"


@dataclass(frozen=True)
class Kind:
    """Describe one kind of file or folder."""

    make: Callable[[Path], object]
    """Write a valid one into an empty folder."""
    use: Callable[[Path], object] | None
    """Read all of it as the commands do; None if every input names its own reader."""
    files: tuple[str, ...] = ()
    json: tuple[str, ...] = ()
    """Those of ``files`` that are one JSON object, or, `.jsonl`, one on the first line."""
    depth: int = 1
    """Depth to which the fields of the JSON are changed."""


def identity() -> Any:
    import pyrage

    return pyrage.x25519.Identity.from_str(IDENTITY)


def sealed(archive: bytes) -> bytes:
    """Seal ``archive`` for ``identity``."""
    import pyrage

    return bytes(pyrage.encrypt(archive, [identity().to_public()]))


def _ticket(folder: Path) -> None:
    for name, content in ticket_files(packed(SHAPES), SHAPES).items():
        (folder / name).write_bytes(content)


def _sealed(folder: Path) -> None:
    archive = vault._archive(ticket_files(packed(SHAPES), SHAPES))
    (folder / SEALED).write_bytes(sealed(archive))


def _release(folder: Path) -> None:
    model = tiny.model(tiny.LLAMA_TIED)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _use_release(folder: Path) -> None:
    from pmp_ds.audit.case import Weights
    from pmp_ds.evaluate.subject import Subject
    from pmp_ds.release import allow_list
    from pmp_ds.release.source import open_source
    from pmp_ds.results import model_digest

    allow_list.problems(folder)
    Weights.open(folder)
    model_digest(folder)
    source = open_source(folder)
    source.digest()
    source.close()
    Subject.open(folder).model(torch.zeros(1, 4, dtype=torch.int64))


def _sharded(folder: Path) -> None:
    """Write two files and an index."""
    tiny.model(tiny.LLAMA_TIED).save_pretrained(folder, max_shard_size="30KB")


def _use_sharded(folder: Path) -> None:
    from pmp_ds.audit.case import Weights
    from pmp_ds.model.base import open_base
    from pmp_ds.model.folder import open_folder

    opened = open_folder(folder)
    opened.require_names()
    opened.load()
    Weights.open(folder)
    base = open_base(folder, opened.config)
    for name, count in base.sizes.items():
        base.read(name, 0, count)


def _tokenizer(folder: Path) -> None:
    byte_tokenizer().save_pretrained(folder)


def _use_tokenizer(folder: Path) -> None:
    import tempfile

    from pmp_ds.model.folder import open_tokenizer
    from pmp_ds.prepare.tokenizer import load_tokenizer
    from pmp_ds.release.tokenizer_files import copy_tokenizer

    text = "some text " + "x" * 200
    open_tokenizer(folder).encode(text)
    load_tokenizer(str(folder)).encode_batch([text])
    with tempfile.TemporaryDirectory() as out:
        copy_tokenizer(folder, Path(out))


def _sentencepiece(folder: Path) -> None:
    from pmp_ds.prepare.spm import train_model

    texts = [f"the {a} {b} is here" for a in "abcdefgh" for b in "ijklmnop"]
    (folder / "tokenizer.model").write_bytes(train_model(texts, 300))


def _use_sentencepiece(folder: Path) -> None:
    from pmp_ds.prepare.tokenizer import load_tokenizer

    load_tokenizer(str(folder / "tokenizer.model")).encode_batch(["some text"])


def measured() -> list[dict[str, Any]]:
    """Return a line of each kind of results.jsonl."""
    found = [
        study.pretrain("pmp", loss=3.0, tokens=2_000_000),
        study.pretrain("base", loss=3.0, source="none", tokens=2_000_000),
        study.fine_tune("pmp", "sst2", "full", score=0.8),
        study.fine_tune("base", "sst2", "full", score=0.8),
        study.fine_tune("pmp", "lm", "lora", score=3.0),
        *study.instruments(),
        study.result("perplexity", "pmp", {"store": "d" * 64}, {"loss": 3.0, "perplexity": 20.0}),
        study.result("last_word", "pmp", {"text": "d" * 64}, {"accuracy": 0.5}),
        study.result("lm_eval", "pmp", {"task": "x"}, {"metrics": {"x": {"acc,none": 0.5}}}),
        study.result("untrained-head", "pmp", {"seed": 0}, {"metrics": {"RTE": {"accuracy": 0.5}}}),
    ]
    return [asdict(result) | {"format_version": 2} for result in found]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _results(folder: Path) -> None:
    (folder / "results.jsonl").write_bytes(_lines(measured()))
    (folder / "audit.json").write_text(json.dumps(study.audit()))


def _use_results(folder: Path) -> None:
    from matplotlib.figure import Figure

    from pmp_ds.study import report

    with patch.object(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(b"")):
        report.write(folder / "results.jsonl", [folder / "audit.json"], folder / "report")


def _use_pictures(folder: Path) -> None:
    """Draw the same, which takes seconds."""
    from pmp_ds.study import report

    report.write(folder / "results.jsonl", [folder / "audit.json"], folder / "report")


def _run(folder: Path) -> None:
    """Write the parts of a run's folder that `report`, `audit`, `export` and `vault` read."""
    run = RunDir(folder)
    run.create()
    part = asdict(Part(folder="a", dataset_id="d" * 64, slots=65536))
    write_json(
        run.data,
        {
            "format_version": 2,
            "dataset_id": "d" * 64,
            "vocab_size": 300,
            "eos_id": 2,
            "bos_id": None,
            "block_size": 32,
            "unigram_cross_entropy": 5.0,
            "documents": 3,
            "tokens": 640,
            "sources": ["corpus"],
            "parts": [part],
        },
    )
    run.config.write_text("run:\n  name: x\n  root: .\n")
    zero = {"stage": 1, "reduce_bucket_size": 1000}
    started = {"ranks": 2, "device": "cpu", "micro_batch_size": 4, "host_memory_before": 10}
    write_json(run.machine, started | {"deepspeed": {"zero_optimization": zero}})
    began = {"phase": "start", "step": 0, "time": 1.5, "start": 1, "resumed": {}}
    records = [
        began,
        {"phase": "discover", "step": 2, "iou": 0.9, "time": 2.5, "start": 1},
        began | {"start": 2, "resumed": {"discover": 500, "train": 0}},
        {"phase": "train", "step": 1, "loss": 5.0, "time": 2.5, "start": 2},
        {"phase": "train", "step": 2, "val_loss": 5.0},
        {"phase": "end", "step": 2, "time": 3.5, "start": 2, "code": 0},
    ]
    run.metrics.write_bytes(_lines(records))
    write_json(
        run.init / "theta0.json", {"format_version": 2, "sha256": "d" * 64, "key_check": "c" * 64}
    )
    vault.begin(run.vault)
    vault.remember(
        run.vault,
        vault.Record(
            name="Partner A",
            keys=("age1x",),
            date="2026-01-02T00:00:00Z",
            watermark="0" * 16,
            file="a.age",
        ),
    )


_RUN_FILES = (
    "data.json",
    "machine.json",
    "metrics.jsonl",
    "private/init/theta0.json",
    "private/vault/sealed.jsonl",
)


def _use_run(folder: Path) -> None:
    from pmp_ds.data.mixture import realised
    from pmp_ds.log import read_metrics, read_starts
    from pmp_ds.state import theta0
    from pmp_ds.state.run_record import export_facts, load_config, read_data
    from pmp_ds.summary import _losses
    from pmp_ds.train import phases
    from pmp_ds.train.budget import Budget
    from pmp_ds.train.planned import started_of

    run = RunDir(folder)
    config = load_config(run)
    if (started := started_of(run, config)) is not None:
        budget = Budget({"w": (8, 8)}, 32, config, started.deepspeed, started.ranks)
        phases.on_device(budget, None)
        phases.host(budget, "save")
    data = read_data(run)
    if data.parts:
        realised([part.slots for part in data.parts], 100, b"k" * 32)
    export_facts(run, 2, 5.0)
    _losses(read_metrics(run.metrics), data.unigram_cross_entropy)
    read_starts(run.metrics)
    theta0.lineage(run)
    vault.records(run.vault)


def _ledger(folder: Path) -> None:
    from pmp_ds.release.ledger import Entry

    entry = Entry(
        date="2026-01-02",
        lineage="d" * 64,
        kind="final",
        updates=4,
        weights="e" * 64,
        released="f" * 64,
        dtype="bf16",
        reason=None,
    )
    (folder / LEDGER).write_bytes(_lines([asdict(entry) | {"format_version": 1}]))


def _use_ledger(folder: Path) -> None:
    from pmp_ds.release import ledger

    ledger.read(folder / LEDGER)


def _checkpoint(folder: Path) -> None:
    from safetensors.torch import save_file

    from pmp_ds.run_dir import sha256
    from pmp_ds.state.manifest import Position, write_manifest

    home = folder / "update-00000004"
    (home / "state").mkdir(parents=True)
    whole = packed(SHAPES)
    older = {f"best/{name}": bits for name, bits in whole.items()}
    save_file(older, home / "state/masks.safetensors")
    state = {f"newest/{name}/0": bits for name, bits in whole.items()}
    save_file(state | {"exp_avg/w/0": torch.zeros(4)}, home / "state/rank-00000.safetensors")
    position = Position(
        step=4, consumed_samples=8, ticket_id=None, dataset_id="d" * 64, val_loss=5.0
    )
    files = {str(p.relative_to(home)): sha256(p) for p in home.rglob("*.safetensors")}
    write_manifest(home, position, files)


def _use_checkpoint(folder: Path) -> None:
    from pmp_ds.state.manifest import verified
    from pmp_ds.state.state_reader import StateReader

    home = folder / "update-00000004"
    verified(home)
    reader = StateReader(home)
    for which in ("newest", "best"):
        kept = reader.candidate(which, SHAPES)
        assert kept is not None
        kept("w", 3, 10)
    reader.read("exp_avg", "w", 0, 4)


def _store(folder: Path) -> None:
    write_store(folder / "store", 0, 20)


def _use_store(folder: Path) -> None:
    from pmp_ds.data.mixed_store import open_data

    store = Store.open(folder / "store")
    store.split("train").gather(np.arange(5))
    Store.open(folder / "store", verify=True)
    open_data({str(folder / "store"): 1.0})


def _glue(folder: Path) -> None:
    rows = [{"sentence": f"a fine film {i}", "label": i % 2} for i in range(8)]
    write_rows(folder / "SST-2/train.jsonl", rows)
    write_rows(folder / "SST-2/validation.jsonl.gz", rows)


def _use_glue(folder: Path) -> None:
    from pmp_ds.glue.read import load
    from pmp_ds.glue.tasks import find_task

    assert load(find_task("sst2"), folder).train.sha256


def _texts(folder: Path) -> None:
    (folder / "texts.jsonl").write_text('{"text": "the keys to John"}\n' * 3)


def _use_texts(folder: Path) -> None:
    from pmp_ds.evaluate.last_word import read_texts

    read_texts(folder / "texts.jsonl")


def _keys(folder: Path) -> None:
    (folder / "partner.pub").write_text(f"# a partner\n{identity().to_public()}\n")
    (folder / "key.txt").write_text(f"# mine\n{IDENTITY}\n")
    (folder / "passphrase").write_text("a long enough passphrase\n")


def _use_keys(folder: Path) -> None:
    keys.public_keys([str(folder / "partner.pub")])
    keys.identities(folder / "key.txt")
    keys.read_passphrase(folder / "passphrase", confirm=False)


def _use_sealed(folder: Path) -> None:
    vault.open_sealed(folder / SEALED, [identity()])


def _corpus(folder: Path) -> None:
    corpora.write(folder)
    byte_tokenizer().save_pretrained(folder / "tokenizer")


def _use_corpus(folder: Path) -> None:
    """Read as `prepare_data` does, with a given tokenizer and with a trained one."""
    for tokenizer in (str(folder / "tokenizer"), None):
        prepare(
            PrepareConfig(
                input=(str(folder / "corpus"),),
                tokenizer=tokenizer,
                train_vocab_size=300,
                out=str(folder / f"store-{tokenizer is None}"),
                block_size=8,
                val_fraction=0.5,
                workers=1,
            )
        )


KINDS: dict[str, Kind] = {
    "ticket": Kind(_ticket, load_ticket, (MASK_FILE, MANIFEST_FILE), (MANIFEST_FILE,), depth=2),
    "sealed ticket": Kind(_sealed, _use_sealed, (SEALED,)),
    "release": Kind(
        _release,
        _use_release,
        ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        ("config.json", "generation_config.json"),
    ),
    "sharded release": Kind(
        _sharded,
        _use_sharded,
        ("model.safetensors.index.json",),
        ("model.safetensors.index.json",),
        depth=2,
    ),
    "tokenizer": Kind(
        _tokenizer,
        _use_tokenizer,
        ("tokenizer.json", "tokenizer_config.json"),
        ("tokenizer.json", "tokenizer_config.json"),
    ),
    "sentencepiece": Kind(_sentencepiece, _use_sentencepiece, ("tokenizer.model",)),
    "results": Kind(
        _results,
        _use_results,
        ("results.jsonl", "audit.json"),
        ("results.jsonl", "audit.json"),
        depth=3,
    ),
    "pictures": Kind(_results, _use_pictures, ()),
    "run": Kind(
        _run,
        _use_run,
        _RUN_FILES,
        _RUN_FILES,
        depth=3,
    ),
    "ledger": Kind(_ledger, _use_ledger, (LEDGER,), (LEDGER,)),
    "checkpoint": Kind(
        _checkpoint,
        _use_checkpoint,
        tuple(
            f"update-00000004/{name}"
            for name in (
                "manifest.json",
                "state/masks.safetensors",
                "state/rank-00000.safetensors",
            )
        ),
        ("update-00000004/manifest.json",),
    ),
    "store": Kind(
        _store,
        _use_store,
        ("store/manifest.json", "store/train/00000-000.arrow"),
        ("store/manifest.json",),
        depth=5,
    ),
    "corpus": Kind(
        _corpus,
        _use_corpus,
        tuple(f"corpus/{name}" for name in corpora.FILES),
        ("corpus/a.jsonl",),
    ),
    "GLUE": Kind(
        _glue,
        _use_glue,
        ("SST-2/train.jsonl", "SST-2/validation.jsonl.gz"),
        ("SST-2/train.jsonl",),
    ),
    "texts": Kind(_texts, _use_texts, ("texts.jsonl",), ("texts.jsonl",)),
    "keys": Kind(_keys, _use_keys, ("partner.pub", "key.txt", "passphrase")),
}
FOLDERS = tuple(KINDS)
"""The kinds of files and folders; the others are texts of settings, with their own tests."""

SETTINGS = {f"settings of {command}": command for command in odd_settings.COMMANDS}
DEEPSPEED = "DeepSpeed JSON"
KINDS |= dict.fromkeys((*SETTINGS, DEEPSPEED), Kind(lambda _: None, None))
