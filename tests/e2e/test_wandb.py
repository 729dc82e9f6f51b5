"""Weights & Biases in its offline mode: what a run sends, read from the file that it writes."""

import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pmp_ds.config import Config, RunConfig
from pmp_ds.errors import UserError
from pmp_ds.log import begin, read_metrics, wandb_sink
from pmp_ds.log.wandb_sink import Wandb, check_installed, public
from pmp_ds.log.writer import MetricsLog
from pmp_ds.run_dir import RunDir

pytestmark = pytest.mark.e2e

CONFIG = Config(run=RunConfig(name="demo", wandb="project"))
has_wandb = importlib.util.find_spec("wandb") is not None
needs_wandb = pytest.mark.skipif(not has_wandb, reason="needs wandb: pip install wandb")


def test_the_settings_that_are_sent() -> None:
    """An allow-list, so that a new setting is not sent by itself."""
    sent = public(CONFIG)
    assert sent["run.name"] == "demo"
    assert {name.partition(".")[0] for name in sent} == {"run", "train"}
    assert set(sent) == {f"{s}.{n}" for s, names in wandb_sink.PUBLIC.items() for n in names}
    assert all(isinstance(value, str | int | float | None) for value in sent.values())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed(RunConfig())
    with pytest.raises(UserError, match=r"run\.wandb=project needs the package wandb: pip install"):
        check_installed(CONFIG.run)


def sent_by(run: RunDir) -> tuple[list[dict[str, Any]], bytes]:
    """Return the rows of history in all files of W&B, and the bytes of all of them."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    files = sorted(path for path in (run.root / "wandb").rglob("*") if path.is_file())
    for path in files:
        for content in _chunks(path.read_bytes()) if path.suffix == ".wandb" else ():
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            rows += [row] if row else []
    return rows, b"".join(path.read_bytes() for path in files)


def _chunks(content: bytes) -> Iterator[bytes]:
    """Yield the records of W&B's file: a header of 7 bytes, then LevelDB's log in one block."""
    assert len(content) < 1 << 15
    place = 7
    while place + 7 <= len(content):
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        assert kind == 1, "a record in several blocks"
        yield content[place + 7 : place + 7 + size]
        place += 7 + size


@needs_wandb
@pytest.mark.nightly
def test_two_starts_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as in metrics.jsonl, and nothing of this machine, the key or a path."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("sys.argv", ["pretrain", "--secret-word-of-the-command-line"])
    run = RunDir(tmp_path / "demo")
    run.create()
    (run.init / "key").write_bytes(b"KEYKEYKEYKEYKEYKEYKEYKEYKEYKEYKE")
    for resumed, steps in (({}, (1, 2, 3)), ({"train": 2}, (3, 4))):
        begin(run.metrics, resumed)
        log = MetricsLog(run, enabled=True, sinks=lambda starts: [Wandb(run, CONFIG, starts)])
        for step in steps:
            log.write("train", step, loss=step / 2, tokens_per_second=float(step))
        log.write("train", steps[-1], val_loss=float("nan"))
        log.close(0)
    rows, content = sent_by(run)
    losses = [(row["update"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 1.5), (4, 2.0)]
    valid = [(r["step"], r["loss"]) for r in read_metrics(run.metrics) if "loss" in r]
    assert set(valid) == set(losses)
    assert [row["system/tokens_per_second"] for row in rows if "train/loss" in row] == [
        1,
        2,
        3,
        3,
        4,
    ]
    assert len([row for row in rows if "eval/val_loss" in row]) == 2
    for word in ("secret-word", "KEYKEY", "private/", f"{socket.gethostname()}\n"):
        assert word.encode() not in content, word
    assert b"demo-1" in content
    assert b"demo-2" in content


REFUSED = """
import sys
from pathlib import Path
from pmp_ds.config import Config, RunConfig
from pmp_ds.errors import exit_code
from pmp_ds.log.wandb_sink import Wandb
from pmp_ds.run_dir import RunDir
config = Config(run=RunConfig(name="demo", wandb="project"))
sys.exit(exit_code(lambda: Wandb(RunDir(Path(sys.argv[1])), config, [])))
"""


@needs_wandb
@pytest.mark.nightly
def test_a_start_that_fails_is_one_line(tmp_path: Path) -> None:
    """Without a login, the error names the setting and the ways out."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(tmp_path)],
        env=environment | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: run.wandb=project: W&B does not start: ") == 1
    assert "WANDB_MODE=offline" in done.stderr
