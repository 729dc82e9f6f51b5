"""A run with a key and a ticket, for the tests of its vault."""

from pathlib import Path

import pytest

from pmp_ds.cli import dump
from pmp_ds.config import Config
from pmp_ds.model.keys import create_key
from pmp_ds.run_dir import RunDir, write_text
from pmp_ds.state import theta0
from pmp_ds.ticket.ticket import save_ticket
from tests.unit.ticket.test_watermark import ticket


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    write_text(run.config, dump(Config()))
    theta0.remember(run, "d" * 64, create_key(run.init))
    save_ticket(ticket(), run.ticket)
    return run
