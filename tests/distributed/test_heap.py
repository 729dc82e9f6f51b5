"""Host memory that tensors free is the system's again, also between blocks that stay."""

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.distributed

MB = 1 << 20


def resident() -> int:
    """Return this process's anonymous memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def returned() -> int:
    """Return the bytes that the system gets back for 64 blocks of 2 MB with small ones between."""
    torch.ones(30 * MB, dtype=torch.uint8)  # freed at once: glibc learns the size
    large, small = [], []
    for _ in range(64):
        large.append(torch.ones(2 * MB, dtype=torch.uint8))
        small.append(torch.ones(100_000, dtype=torch.uint8))
    before = resident()
    large.clear()
    assert len(small) == 64
    return before - resident()


def test_large_blocks_return_to_the_system(ranks1):
    assert ranks1.run(returned)[0] > 120 * MB
