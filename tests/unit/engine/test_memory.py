"""The memory that is free, and the memory that a computation takes, by hand."""

from pathlib import Path

import psutil
import pytest
import torch

from pmp_ds.engine import memory
from pmp_ds.engine.memory import Meter, free_bytes, hardware

CPU = torch.device("cpu")
KB = 1000


def test_the_peak_of_a_computation():
    """Tensors of 4,000 bytes: two at once, then three; 4 bytes of their sum stay."""

    def compute() -> None:
        one = torch.ones(KB)
        two = one * 2
        del one
        total.append((two[:10] + 1).sum())  # a view of 40 bytes, its successor, their sum

    total: list[torch.Tensor] = []
    with Meter(CPU) as meter:
        assert meter.peak_of(compute) == 2 * 4 * KB
        kept = torch.ones(KB)
        assert meter.peak_of(compute) == 3 * 4 * KB + 4
        assert meter.peak_of(lambda: None) == 4 * KB + 2 * 4
    assert len(kept) == KB


def test_memory_that_nobody_has_written_to_takes_no_room():
    with Meter(CPU) as meter:
        bucket = torch.empty(10**9)
        assert meter.peak_of(lambda: None) == 0
        ones = torch.ones(KB)
        assert meter.peak_of(lambda: torch._foreach_copy_([bucket[KB : 2 * KB]], [ones])) == 12 * KB


def test_tensors_on_the_meta_device():
    """They take no memory, but a Meter for that device counts what they would take."""
    with Meter(CPU) as meter:
        assert meter.peak_of(lambda: torch.ones(KB, device="meta").exp_()) == 0
    held: list[int] = []
    with Meter(torch.device("meta"), held.append) as meter:
        one = torch.ones(KB, device="meta")
        assert meter.peak_of(one.exp) == 2 * 4 * KB
        assert meter.peak_of(lambda: None) == 4 * KB
    assert held == [4 * KB, 2 * 4 * KB]


def test_gradients_and_what_the_backward_pass_keeps():
    weight = torch.nn.Parameter(torch.ones(KB))

    def compute() -> None:
        kept: list[torch.Tensor] = [weight]
        for _ in range(5):
            kept.append(kept[-1].exp())
        del kept[:-1]
        kept[0].sum().backward()

    with Meter(CPU) as meter:
        peak = meter.peak_of(compute)
    assert 6 * 4 * KB < peak < 9 * 4 * KB, "the weight, five results, and a gradient or two"


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_the_memory_of_a_container(container):
    (container / "memory.max").write_text("5000000\n")
    (container / "memory.current").write_text("4000000\n")
    (container / "memory.stat").write_text("anon 3500000\ninactive_file 200000\n")
    assert free_bytes(CPU) == 5_000_000 - 4_000_000 + 200_000
    assert hardware(CPU) == "CPU with 0 GB"


@pytest.mark.parametrize("limit", ["max\n", None])
def test_no_container(container, limit):
    if limit is not None:
        (container / "memory.max").write_text(limit)
    total = psutil.virtual_memory().total
    assert 0 < free_bytes(CPU) <= total
    assert hardware(CPU) == f"CPU with {total / 1e9:.0f} GB"
