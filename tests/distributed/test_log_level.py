"""What a run prints at each --log-level."""

import re
from pathlib import Path

import pytest

from tests.helpers.commands import ok
from tests.helpers.commands import run as real
from tests.helpers.forks import command
from tests.helpers.lives import SETTINGS
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

PROGRESS = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ train: "


@pytest.mark.parametrize("level", daily(["debug", "info", "warning"], ["warning"]))
def test_what_is_printed(work: Path, tmp_path: Path, level: str) -> None:
    flags = ("--config", "tiny.yaml", "--data.store", "store", "--deepspeed-config", "zero1.json")
    run = ("--run.root", tmp_path, "--guard.spike_sigmas", "1e-9")
    words = ("pretrain.py", *flags, *SETTINGS, *run, "--log-level", level)
    # DeepSpeed writes where standard output was when it was imported.
    done = ok(real(*words, cwd=work) if level == "debug" else command(*words, cwd=work))
    assert ("done: ticket of" in done.stdout) == (level != "warning")
    assert bool(re.search(PROGRESS, done.stderr, re.MULTILINE)) == (level != "warning")
    assert ("DeepSpeed info: version" in done.stdout + done.stderr) == (level == "debug")
    if level == "warning":
        assert (done.stdout, done.stderr) == ("", "")
