import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmp_ds.ticket.scores import Scores
from tests.helpers.examples import examples

FIRST = [torch.tensor([1.0, -4.0]), torch.tensor([0.0])]
SECOND = [torch.tensor([-3.0, 0.0]), torch.tensor([-1.0])]


def test_gradient_is_the_newest_gradient_without_a_copy():
    scores = Scores("gradient")
    scores.update(FIRST)
    found = scores.update(SECOND)
    assert [f.data_ptr() for f in found] == [g.data_ptr() for g in SECOND]
    assert scores.values is None


def test_mean_by_hand():
    scores = Scores("mean")
    assert [f.tolist() for f in scores.update(FIRST)] == [[1.0, 4.0], [0.0]]
    assert [f.tolist() for f in scores.update(SECOND)] == [[4.0, 4.0], [1.0]]  # twice the mean


def test_ema_by_hand():
    scores = Scores("ema", decay=0.75)
    assert [f.tolist() for f in scores.update(FIRST)] == [[0.25, 1.0], [0.0]]
    assert [f.tolist() for f in scores.update(SECOND)] == [[0.9375, 0.75], [0.25]]


@pytest.mark.parametrize("kind", ["mean", "ema", "gradient"])
def test_gradients_are_left_alone(kind):
    gradients = [torch.tensor([1.0, -2.0])]
    scores = Scores(kind)
    for _ in range(3):
        scores.update(gradients)
    assert gradients[0].tolist() == [1.0, -2.0]


@pytest.mark.parametrize("kind", ["mean", "ema"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_are_summed_in_fp32(kind, dtype):
    """256 + 1 is 256 in bfloat16: a running sum in the gradient's own dtype would stand still."""
    scores = Scores(kind, decay=0.5)
    first, second = torch.tensor([256.0], dtype=dtype), torch.tensor([1.0], dtype=dtype)
    scores.update([first])
    (found,) = scores.update([second])
    assert found.dtype == torch.float32
    assert found.tolist() == ([257.0] if kind == "mean" else [64.5])


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_loss_scale_is_taken_out(kind):
    """fp16 changes it between updates; what it hides from fp16's range is not lost."""
    plain, scaled = Scores(kind, 0.5), Scores(kind, 0.5)
    for step, scale in enumerate([2.0**16, 2.0**15, 2.0**17]):
        gradient = torch.tensor([2.0**-12, -(2.0**-9), 0.0]) * (step + 1)
        (expected,) = plain.update([gradient])
        (found,) = scaled.update([(gradient * scale).half()], scale)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_nan_stays(kind):
    scores = Scores(kind)
    scores.update([torch.tensor([torch.nan, 1.0])])
    (found,) = scores.update([torch.tensor([1.0, 1.0])])
    assert found.isnan().tolist() == [True, False]


def test_number_of_fragments_must_not_change():
    scores = Scores("mean")
    scores.update(FIRST)
    with pytest.raises(ValueError, match="zip"):
        scores.update(FIRST[:1])


trace = st.lists(
    st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5), min_size=1, max_size=8
)


@examples()
@given(trace, st.sampled_from([0.5, 0.9, 0.95]))
def test_ranks_like_the_definition(steps, decay):
    """mean: sum of |g| / t. ema: sum of decay^(t-i) |g_i|, up to a factor."""
    running = {kind: Scores(kind, decay) for kind in ("mean", "ema")}
    for gradient in steps:
        found = {k: s.update([torch.tensor(gradient)])[0].clone() for k, s in running.items()}
    absolute = torch.tensor(steps, dtype=torch.float64).abs()
    ages = torch.arange(len(steps) - 1, -1, -1, dtype=torch.float64)
    mean = absolute.mean(dim=0)
    ema = (absolute * (1 - decay) * decay ** ages[:, None]).sum(dim=0)
    # fp32 sums of 8 terms
    torch.testing.assert_close(found["mean"].double() / len(steps), mean, rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(found["ema"].double(), ema, rtol=2e-6, atol=1e-30)
