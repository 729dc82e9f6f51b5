"""Settings whose checks are more than a comparison."""

import math

import pytest

from pmp_ds.cli import dump, parse
from pmp_ds.config import Config, RunConfig
from pmp_ds.errors import UserError

TIMES = {
    "90": 90.0,
    "0.5": 0.5,
    "01:30": 90.0,
    "01:30:00": 5400.0,
    "23:59:59": 86399.0,
    "100:00:00": 360000.0,
}


@pytest.mark.parametrize(("text", "seconds"), TIMES.items())
def test_max_time(tmp_path, text, seconds):
    """As a flag, in YAML, where 01:30:00 is a number to some readers, and in a run's own file."""
    config, _ = parse(Config, ["--run.max_time", text])
    assert config.run.max_seconds == seconds
    path = tmp_path / "run.yaml"
    for content in (f"run: {{max_time: {text}}}\n", f'run: {{max_time: "{text}"}}\n', dump(config)):
        path.write_text(content)
        config, _ = parse(Config, ["--config", str(path)])
        assert config.run.max_seconds == seconds, content


def test_no_max_time():
    assert RunConfig().max_seconds == math.inf


@pytest.mark.parametrize("text", ["", "soon", "0", "-5", "1:2:3:4", "inf", "nan", "1:-2", "::"])
def test_no_time(text):
    with pytest.raises(UserError, match=r"run\.max_time=.* is no time: write HH:MM:SS"):
        RunConfig(max_time=text)
