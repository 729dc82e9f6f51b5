from hypothesis import given
from hypothesis import strategies as st

from pmp_ds.ticket.early_bird import EarlyBird
from tests.helpers.examples import examples


def first_stable(trace: list[float], threshold: float, patience: int) -> int | None:
    """Index of the IoU at which the ticket is drawn."""
    early_bird = EarlyBird(threshold, patience)
    return next((i for i, iou in enumerate(trace) if early_bird.observe(iou)), None)


def test_by_hand():
    #        no   yes   yes   broken yes   yes   yes: three in a row
    trace = [0.5, 0.99, 0.995, 0.98, 0.99, 0.999, 0.99, 0.2]
    assert first_stable(trace, 0.99, 3) == 6
    assert first_stable(trace, 0.99, 2) == 2
    assert first_stable(trace, 0.99, 1) == 1
    assert first_stable(trace, 0.99, 4) is None


def test_threshold_itself_counts():
    assert first_stable([0.99], 0.99, 1) == 0
    assert first_stable([0.9899999], 0.99, 1) is None


def test_perfect_agreement_can_be_asked_for():
    assert first_stable([0.999, 1.0, 1.0], 1.0, 2) == 2


def test_trace_keeps_everything():
    early_bird = EarlyBird(0.9, 2)
    for iou in (0.1, 0.95, 0.2):
        early_bird.observe(iou)
    assert early_bird.trace == [0.1, 0.95, 0.2]
    assert EarlyBird(0.9, 2).trace == [], "the trace is shared between objects"


def test_best_so_far_is_the_first_of_equals():
    early_bird, best = EarlyBird(1.0, 9), []
    assert not early_bird.best_so_far
    for iou in (0.5, 0.4, 0.7, 0.7, 0.6, 0.8):
        early_bird.observe(iou)
        best.append(early_bird.best_so_far)
    assert best == [True, False, True, False, False, True]


def test_best_of_disjoint_masks():
    early_bird = EarlyBird(1.0, 9)
    early_bird.observe(0.0)
    assert early_bird.best_so_far


@examples()
@given(st.lists(st.floats(0, 1), max_size=30), st.integers(1, 4))
def test_equals_the_definition(trace, patience):
    """The first index whose last ``patience`` IoUs all reach the threshold."""
    ends = [
        i
        for i in range(patience - 1, len(trace))
        if all(iou >= 0.5 for iou in trace[i - patience + 1 : i + 1])
    ]
    assert first_stable(trace, 0.5, patience) == (ends[0] if ends else None)
