"""DeepSpeed JSON sections for measurement produce output and change nothing."""

import contextlib
import json
from collections.abc import Iterator

import deepspeed.comm.comm
import pytest

from tests.helpers import tiny
from tests.helpers.lives import same_end

pytestmark = pytest.mark.distributed


@contextlib.contextmanager
def afterwards_off() -> Iterator[None]:
    """Switch DeepSpeed's logger off again: there is one per process, and it stays on."""
    try:
        yield
    finally:
        deepspeed.comm.comm.comms_logger.enabled = False


def test_comms_logger_prints_its_table(lives, run, calm, work):
    logger = {"comms_logger": {"enabled": True}}
    (work / "zero1-comms.json").write_text(json.dumps(tiny.ds_json(1) | logger))
    one, other = lives(fault=afterwards_off, stage="1-comms")
    assert (one.code, other.code) == (0, 0), one
    assert "Message Size" in one.out + one.err
    assert "all_reduce" in one.out + one.err
    same_end(calm, run)
