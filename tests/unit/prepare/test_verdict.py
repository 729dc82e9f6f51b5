"""Packing begins before the engine is approved; nothing of a refused one is left in the store."""

import dataclasses
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pmp_ds.errors import UserError
from pmp_ds.prepare import build, workers
from pmp_ds.prepare import encoder as encoder_module
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.encoder import Encoder, choose_engine
from pmp_ds.prepare.prepare import prepare
from pmp_ds.prepare.summary import PrepareSummary
from pmp_ds.prepare.tokenizer import TrainedTokenizer
from pmp_ds.prepare.units import pack_unit
from tests.unit.prepare.conftest import make_texts


@pytest.fixture
def config(tmp_path: Path, trained: TrainedTokenizer) -> PrepareConfig:
    """Three files, each a unit."""
    trained.save_pretrained(tmp_path / "tokenizer")
    texts = make_texts(90)
    for part in range(3):
        rows = [json.dumps({"text": text}) for text in texts[part::3]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(rows))
    return PrepareConfig(
        input=tuple(str(tmp_path / f"{part}.jsonl") for part in range(3)),
        out=str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer"),
        block_size=16, val_fraction=0.2, workers=1,
    )  # fmt: skip


@pytest.fixture
def correct(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> PrepareSummary:
    """With the reference; from here on units are small and the engine gives other ids."""
    groups = build.group_units
    monkeypatch.setattr(build, "group_units", lambda sources: groups(sources, unit_bytes=25_000))
    out = config.out + "-reference"
    summary = prepare(dataclasses.replace(config, out=out, engine="reference"))

    def encode_batch(documents: list[bytes], *, parallel: bool) -> Any:
        ends = np.cumsum([0, *map(len, documents)])
        data = np.full(ends[-1], 7, np.uint32)
        offsets, content = SimpleNamespace(data=ends), SimpleNamespace(data=data)
        return SimpleNamespace(layout=SimpleNamespace(offsets=offsets, content=content))

    wrong = SimpleNamespace(encode_batch=encode_batch)
    monkeypatch.setattr(encoder_module, "_load_fast", lambda _: wrong)
    return summary


class Spy:
    """Has units packed before the engine is looked at, and remembers them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, units: int) -> None:
        self.packed: list[str] = []
        """Which engine, of every unit that was begun."""
        self.enough = threading.Event()
        self.look = choose_engine
        self._units = units
        monkeypatch.setattr(workers, "pack_unit", self.pack)
        monkeypatch.setattr(build, "choose_engine", self._choose)

    def pack(self, job, *rest):
        self.packed.append(job.encoder.engine.split()[0])
        try:
            return pack_unit(job, *rest)
        finally:
            if len(self.packed) == self._units:
                self.enough.set()

    def _choose(self, encoder: Encoder, sample: list[str]):
        assert encoder.spec.fast is None or self.enough.wait(60)
        return self.look(encoder, sample)


def check(found: PrepareSummary, correct: PrepareSummary) -> None:
    """Equal to the byte, a warning apart."""
    assert found.manifest["dataset_id"] == correct.manifest["dataset_id"]
    assert found.manifest["splits"] == correct.manifest["splits"]
    assert found.manifest["tokenizer"] == correct.manifest["tokenizer"]
    names = [{p.relative_to(s.folder) for p in s.folder.rglob("*")} for s in (found, correct)]
    assert names[0] == names[1]
    assert "gigatoken gives other ids" in found.warnings[0]


def test_what_a_refused_engine_packed_is_packed_again(config, correct, monkeypatch):
    monkeypatch.setattr(Encoder, "_spot_check", lambda *_: None)
    spy = Spy(monkeypatch, units=3)
    check(prepare(config), correct)
    assert spy.packed == ["gigatoken"] * 3 + ["tokenizers"] * 3


def test_a_refused_engine_stops_at_once(config, correct, monkeypatch):
    """At its next batch after the verdict, not at the end of its unit."""
    spy = Spy(monkeypatch, units=1)

    def endless(job, encoder, unit, on_bytes):
        if job.encoder.fast is None:
            return spy.pack(job, encoder, unit, on_bytes)
        spy.enough.set()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            on_bytes(0)
        pytest.fail("not stopped")

    monkeypatch.setattr(workers, "pack_unit", endless)
    check(prepare(config), correct)
    assert spy.packed == ["tokenizers"] * 3


def test_the_error_of_a_refused_engine_is_not_the_users(config, correct, monkeypatch):
    spy = Spy(monkeypatch, units=1)  # its spot check fails
    check(prepare(config), correct)
    assert spy.packed[0] == "gigatoken"
    assert spy.packed[-3:] == ["tokenizers"] * 3


def test_a_killed_run_passes_nothing_of_it_on(config, correct, monkeypatch):
    """Stopped with all units packed and no verdict; the next run refuses the engine."""

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Encoder, "_spot_check", lambda *_: None)
    spy = Spy(monkeypatch, units=3)
    spy.look = no_space
    with pytest.raises(UserError, match="No space left"):
        prepare(config)
    spy.look = choose_engine
    assert len(list(Path(config.out + ".incomplete", "units").glob("*.json"))) == 3
    check(prepare(config), correct)
    assert spy.packed == ["gigatoken"] * 3 + ["tokenizers"] * 3
