"""Sums over ranks of which some have nothing, on the device and in host memory (offload)."""

from typing import Any

import pytest
import torch

from pmp_ds import dist
from pmp_ds.ticket.mask import unpack
from pmp_ds.ticket.topk import TopK

pytestmark = [pytest.mark.pretend, pytest.mark.distributed]

SCORES = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0]
FOUR_HIGHEST = [False, False, False, False, True, True, False, True, True]


def select_where_rank1_has_none(device: str) -> tuple[list[Any], int]:
    """This rank's part of a selection, and how often the host waited for the device."""
    from tests.pretend.device.findings import watch

    share = [torch.tensor(SCORES, device=device)] if dist.rank() == 0 else []
    top = TopK([0] * len(share), ["w"] * len(share))
    top.select(share, 4)  # the first time, ranks exchange what they have
    with watch() as watched:
        masks, _ = top.select(share, 4)
        waits = sum(f.kind == "wait" for f in watched.findings)
    return [unpack(m.cpu(), len(SCORES)).tolist() for m in masks], waits


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_rank_without_scores_sums_where_the_others_do(pretend2: Any, device: str) -> None:
    (first, _), (second, waits) = pretend2.run(select_where_rank1_has_none, device, timeout=60)
    assert first == [FOUR_HIGHEST]
    assert second == []
    if device == "cpu":
        assert waits == 0, "host memory is summed without the device"
