"""Preparing six times as much text takes no more memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pmp_ds.prepare.tokenizer import TrainedTokenizer
from tests.unit.prepare.conftest import make_texts

pytestmark = pytest.mark.processes

SCRIPT = """
import re, sys
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare import corpus, prepare
corpus._MIN_UNIT_BYTES = 4 << 20
tokenizer, name = sys.argv[1:]
prepare.prepare(PrepareConfig(input=(name,), out=name + ".store", tokenizer=tokenizer, workers=2))
print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, trained: TrainedTokenizer):
    """Two threads, so that one process has it all: 20 MB and 120 MB, side by side."""
    trained.save_pretrained(tmp_path / "tokenizer")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(2000))
    processes = []
    for name, megabytes in (("small.jsonl", 20), ("large.jsonl", 120)):
        (tmp_path / name).write_text(rows * (megabytes * 1_000_000 // len(rows)))
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "tokenizer"), str(tmp_path / name)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    small, large = (int(process.communicate(timeout=300)[0]) for process in processes)
    assert large - small < 40, f"peak {small} MB for 20 MB of text, {large} MB for 120 MB"
