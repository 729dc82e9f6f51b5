"""The arithmetic of `train.micro_batch_size: auto`, by hand."""

from pathlib import Path

import pytest

from pmp_ds.run_dir import RunDir
from pmp_ds.train.micro_batch import Room, _read, _write

GB = 10**9

# (free, states, activations of each sequence, a rank's share) -> micro-batch
BY_HAND = {
    (100, 20, 10, 32): 4,  # 90 - 20 = 70: 7 fit; powers of two, which are the divisors
    (100, 20, 5, 12): 12,  # 14 fit
    (100, 20, 6, 12): 8,  # 11 fit: a power of two
    (100, 20, 10, 12): 6,  # 7 fit: a divisor
    (100, 20, 3, 31): 16,  # 23 fit, and 31 has no divisor
    (100, 20, 2, 31): 31,
    (100, 20, 70, 8): 1,
    (100, 20, 71, 8): 1,  # none fits
    (100, 95, 1, 8): 1,
    (100, 20, 0, 8): 8,  # too little to be seen
}


@pytest.mark.parametrize(("given", "expected"), BY_HAND.items())
def test_by_hand(given, expected):
    free, states, each, share = given
    assert Room(free, states, each).largest(share) == expected


def test_in_words():
    room = Room(80 * GB, int(3.1 * GB), int(0.42 * GB))
    assert room.in_words(16) == (
        "states 3.10 GB + 16 x 0.42 GB activations <= 90% of 80.00 GB free"
    )
    assert Room(GB // 100, GB // 50, GB // 1000).in_words(1) == (
        "states 20.00 MB + 1 x 1.00 MB activations > 90% of 10.00 MB free: memory may run out"
    )


@pytest.mark.parametrize("content", ["", "[]", '{"here": "8"}', '{"here": 0}', '{"here": true}'])
def test_a_damaged_memory_is_measured_again(tmp_path: Path, content):
    run = RunDir(tmp_path)
    assert _read(run) == {}
    _write(run, {"here": 8})
    assert _read(run) == {"here": 8}
    run.micro_batch.write_text(content)
    assert _read(run) == {}
