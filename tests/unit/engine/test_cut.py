"""The division of a batch, with numbers worked out by hand."""

import pytest
import torch

from pmp_ds.config import TrainConfig
from pmp_ds.engine.cut import Cut
from pmp_ds.errors import UserError


def cut(size: int, limit: int, ranks: int) -> Cut:
    return Cut.of(TrainConfig(global_batch_size=size, micro_batch_size=limit), ranks)


# (sequences, largest micro-batch, ranks) -> (micro-batch, accumulation steps, repeated rows)
BY_HAND = {
    (32, 32, 1): (32, 1, 0),  # what divides, as it stands in the settings
    (32, 4, 2): (4, 4, 0),
    (16, 8, 2): (8, 1, 0),
    (32, 32, 2): (16, 1, 0),  # larger than a share
    (16, 8, 4): (4, 1, 0),
    (32, 32, 3): (11, 1, 1),  # 11, 11, 10
    (16, 16, 3): (6, 1, 2),  # 6, 5, 5
    (16, 4, 3): (3, 2, 2),  # 6 = 3 + 3, not 4 + 2
    (32, 8, 3): (6, 2, 4),  # 11 = 6 + 5, 10 = 6 + 4
    (32, 12, 1): (11, 3, 1),  # one rank: 32 = 11 + 11 + 10
    (7, 1, 2): (1, 4, 1),
    (5, 32, 5): (1, 1, 0),
}


@pytest.mark.parametrize(("given", "expected"), BY_HAND.items())
def test_by_hand(given, expected):
    found = cut(*given)
    assert (found.micro_batch_size, found.accumulation_steps, found.repeated) == expected


def test_every_cut_holds_the_batch_and_no_more_than_allowed():
    for size in range(1, 41):
        for limit in range(1, 41):
            for ranks in range(1, size + 1):
                found, share = cut(size, limit, ranks), -(-size // ranks)
                assert found.micro_batch_size <= limit
                assert found.rows >= share
                # Fewer steps would not do, smaller micro-batches neither.
                assert limit * (found.accumulation_steps - 1) < share
                assert found.rows - found.accumulation_steps < share
                if size % (limit * ranks) == 0:
                    assert (found.micro_batch_size, found.repeated) == (limit, 0)


def test_more_ranks_than_sequences():
    with pytest.raises(UserError, match=r"train\.global_batch_size=2 .* 3 ranks: start at most 2"):
        cut(2, 2, 3)


def test_weights_give_the_mean_over_the_batch():
    """5 losses over 2 ranks, 3 and 2 of them: 30 / 5 = 6, in two micro-batches of 2 rows."""
    losses, found = torch.tensor([[1.0], [2.0], [3.0], [10.0], [14.0]]), cut(5, 2, 2)
    means = []
    for share in losses.split([3, 2]):
        rows, weights = found.fill(share)
        assert rows.shape == (4, 1)
        expected = [2 * 4 / 5] * len(share) + [0.0] * (4 - len(share))
        assert weights.tolist() == pytest.approx(expected)
        assert (rows[len(share) :] == share[-1]).all()
        means.append((rows[:, 0] * weights).mean())
    assert float(sum(means) / 2) == pytest.approx(6.0)


def test_equal_shares_are_left_alone():
    share = torch.rand(4, 3)
    rows, weights = cut(12, 2, 3).fill(share)
    assert rows is share
    assert torch.equal(weights, torch.ones(4))


def test_in_words():
    assert cut(8, 2, 2).in_words() == "2 sequences x 2 accumulation steps x 2 ranks = 8 sequences"
    assert cut(8, 2, 2).unused == ""
    assert cut(32, 32, 2).in_words() == (
        "16 sequences x 1 accumulation step x 2 ranks = 32 sequences"
    )
    assert cut(32, 32, 2).unused == (
        " (train.micro_batch_size=32 is more than a rank's share of 16)"
    )
    assert cut(32, 32, 3).in_words() == (
        "11 sequences x 1 accumulation step x 3 ranks - 1 repeated with weight 0 = 32 sequences"
    )
    assert cut(32, 12, 1).unused == (
        " (train.micro_batch_size=12 does not divide a rank's share of 32)"
    )
