"""The store is the same for any number of workers, and after a kill at any moment."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pmp_ds.errors import UserError
from pmp_ds.prepare import corpus as corpus_module
from pmp_ds.prepare import units as units_module
from pmp_ds.prepare import workers as workers_module
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import Unit
from pmp_ds.prepare.prepare import prepare
from tests.helpers.tiers import daily
from tests.unit.prepare.conftest import make_texts

pytestmark = pytest.mark.processes

# Each of the six files is larger than half a unit.
SCRIPT = """
import json, sys, time
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare import corpus, prepare, workers
corpus._MIN_UNIT_BYTES = 40_000
if __name__ == "__main__":
    prepare.prepare(PrepareConfig(**json.loads(sys.argv[1])))
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = make_texts(240)
    for part in range(6):
        rows = [json.dumps({"text": text}) for text in texts[part::6]]
        rows += ["{"] if part == 3 else []
        (folder / f"{part}.jsonl").write_text("\n".join(rows))
    return folder


def settings(corpus: Path, name: str, **changes) -> dict:
    return {
        "input": [str(corpus)],
        "out": str(corpus.parent / name),
        "train_vocab_size": 400,
        "block_size": 16,
        "val_fraction": 0.1,
        **changes,
    }


def config(corpus: Path, name: str, **changes) -> PrepareConfig:
    return PrepareConfig(**settings(corpus, name, **changes) | {"input": (str(corpus),)})


def start(tmp_path: Path, arguments: dict) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen([sys.executable, str(script), json.dumps(arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def one_worker(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setattr(corpus_module, "_MIN_UNIT_BYTES", 40_000)
    prepare(config(corpus, "one", workers=1))
    return contents(corpus.parent / "one")


@pytest.mark.parametrize("workers", daily([2, 3, 5], [2, 3]))
def test_same_bytes_for_any_number_of_workers(corpus: Path, one_worker, workers: int):
    """Two work as threads, more as processes."""
    prepare(config(corpus, "many", workers=workers))
    assert contents(corpus.parent / "many") == one_worker
    manifest = json.loads(one_worker["manifest.json"])
    assert manifest["rows"]["rejected"] == [f"1 x not JSON (first: {corpus}/3.jsonl:41)"]
    assert len(manifest["splits"]["train"]["shards"]) == 6


@pytest.mark.nightly
def test_killed_ten_times_gives_the_same_bytes(corpus: Path, one_worker):
    chance = random.Random(0)
    arguments = settings(corpus, "killed", workers=2)
    kills = 0
    while kills < 10:  # threads and processes in turn
        process = start(corpus.parent, arguments | {"workers": 2 + kills % 2})
        try:
            process.wait(timeout=chance.uniform(0.5, 3.0))
            shutil.rmtree(corpus.parent / "killed")  # too fast for the killer: from the start
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert start(corpus.parent, arguments).wait(timeout=120) == 0
    assert contents(corpus.parent / "killed") == one_worker
    assert not (corpus.parent / "killed.incomplete").exists()


def run_until(corpus: Path, monkeypatch: pytest.MonkeyPatch, units: int) -> PrepareConfig:
    """Stop, as by a full disk, before unit number ``units``."""
    pack_unit = units_module.pack_unit

    def stopping(job, unit, on_bytes):
        if unit.index == units:
            raise OSError(28, "No space left on device")
        return pack_unit(job, unit, on_bytes)

    found = config(corpus, "stopped", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr("pmp_ds.prepare.workers.pack_unit", stopping)
        with pytest.raises(UserError, match="No space left"):
            prepare(found)
    return found


def spy_on_units(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the units that are packed from now on."""
    seen: list[int] = []
    pack_unit = units_module.pack_unit

    def spy(job, unit, on_bytes):
        seen.append(unit.index)
        return pack_unit(job, unit, on_bytes)

    monkeypatch.setattr("pmp_ds.prepare.workers.pack_unit", spy)
    return seen


def test_finished_units_are_not_packed_again(corpus: Path, one_worker, monkeypatch):
    stopped = run_until(corpus, monkeypatch, 4)
    seen = spy_on_units(monkeypatch)
    damaged = corpus.parent / "stopped.incomplete" / "train" / "00001-000.arrow"
    data = bytearray(damaged.read_bytes())
    data[-100] ^= 1
    damaged.write_bytes(data)  # found by its sha256, and made again
    monkeypatch.setattr("pmp_ds.prepare.planning.train_tokenizer", None)  # nor is that repeated
    prepare(stopped)
    assert seen == [1, 4, 5]
    assert contents(corpus.parent / "stopped") == one_worker


def test_changed_input_starts_over(corpus: Path, one_worker, monkeypatch):
    stopped = run_until(corpus, monkeypatch, 4)
    os.utime(corpus / "0.jsonl", (1, 1))
    seen = spy_on_units(monkeypatch)
    prepare(stopped)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert contents(corpus.parent / "stopped") == one_worker


def test_another_engine_starts_over(corpus: Path, one_worker, monkeypatch):
    stopped = dataclasses.replace(run_until(corpus, monkeypatch, 4), engine="reference")
    seen = spy_on_units(monkeypatch)
    prepare(stopped)
    assert seen == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("workers", daily([1, 3], [1]))
def test_raised_max_malformed_goes_on_with_what_is_packed(
    corpus: Path, one_worker, monkeypatch, workers: int
):
    right = config(corpus, "mended", workers=workers)
    with pytest.raises(UserError, match=r"1 of 241 rows .* 6 finished parts are kept in .*mended"):
        prepare(dataclasses.replace(right, max_malformed=0.001))
    seen = spy_on_units(monkeypatch)
    prepare(right)
    assert seen == []
    assert contents(corpus.parent / "mended") == one_worker


@dataclasses.dataclass
class JobLike:
    """Provide the part of a job that the threads need."""

    encoder: Any


def test_a_failed_unit_stops_the_other_thread(monkeypatch):
    """It stops at its next batch, not at the end of its unit."""
    stopped = threading.Event()
    other_runs = threading.Event()

    def packing(job, unit, on_bytes):
        if unit.index == 0:
            assert other_runs.wait(60)
            raise OSError(28, "No space left on device")
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                on_bytes(0)
                other_runs.set()
        except Exception:
            stopped.set()
            raise

    monkeypatch.setattr(workers_module, "pack_unit", packing)
    units = [Unit(index=i, sources=()) for i in range(9)]
    job: Any = JobLike(SimpleNamespace(twin=lambda: None))
    with pytest.raises(OSError, match="No space left"):
        workers_module.pack_units(job, units, 2, print, lambda _: None)
    assert stopped.is_set()


def test_lost_worker_is_named_and_keeps_what_is_finished(corpus: Path, one_worker):
    arguments = settings(corpus, "lost", workers=3)
    script = SCRIPT.replace(
        "if __name__",
        "import os\npack = workers.pack_unit\n"
        "def dying(job, unit, *rest):\n"
        "    if unit.index == 5 and not os.path.exists(sys.argv[2]):\n"
        "        open(sys.argv[2], 'w').close(); os.kill(os.getpid(), 9)\n"
        "    return pack(job, unit, *rest)\n"
        "workers.pack_unit = dying\nif __name__",
    )
    path = corpus.parent / "script.py"
    path.write_text(script)
    command = [sys.executable, str(path), json.dumps(arguments), str(corpus.parent / "died")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "worker processes died" in done.stderr
    assert list((corpus.parent / "lost.incomplete" / "units").glob("*.json"))
    prepare(config(corpus, "lost", workers=1))
    assert contents(corpus.parent / "lost") == one_worker


def test_workers_end_with_their_parent(corpus: Path):
    process = start(corpus.parent, settings(corpus, "orphans", workers=3))
    children: list[int] = []
    deadline = time.monotonic() + 60
    while process.poll() is None and len(children) < 2 and time.monotonic() < deadline:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        children = [
            int(pid) for pid in listed if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert children or process.returncode == 0
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.05)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
