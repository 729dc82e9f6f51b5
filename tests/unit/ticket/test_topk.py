import itertools
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmp_ds.errors import UserError
from pmp_ds.ticket import counting
from tests.helpers import reference
from tests.helpers.examples import examples
from tests.helpers.selection import extra_bytes, select_masks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(DTYPES)


def brute_force(scores: torch.Tensor, k: int) -> torch.Tensor:
    """One flat vector in global order: stable sort, so ties go to the lowest global index."""
    magnitude = scores.double().abs()
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[torch.sort(magnitude, descending=True, stable=True).indices[:k]] = True
    return kept


def select(
    scores: torch.Tensor, cuts: Sequence[int], order: Sequence[int], k: int, **options
) -> torch.Tensor:
    """Apply select_top_k to ``scores`` cut at ``cuts`` and passed in ``order``; assemble the
    result."""
    borders = [0, *sorted(cuts), len(scores)]
    spans = [list(itertools.pairwise(borders))[i] for i in order]
    masks = select_masks(
        [scores[a:b].contiguous() for a, b in spans],
        [a for a, _ in spans],
        [f"p{a}" for a, _ in spans],
        k,
        **options,
    )
    whole = torch.zeros(len(scores), dtype=torch.bool)
    for (a, b), mask in zip(spans, masks, strict=True):
        assert mask.dtype == torch.bool
        whole[a:b] = mask
    return whole


def select_whole(scores: torch.Tensor, k: int, **options) -> list[bool]:
    return select_masks([scores], [0], ["p"], k, **options)[0].tolist()


def on(*indices: int, of: int = 10) -> list[bool]:
    return [i in indices for i in range(of)]


TEN = torch.tensor([0.5, -3.0, 0.0, 2.0, -2.0, 2.0, 0.25, 0.0, -0.5, 1.0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k", "kept"),
    [
        (1, [1]),
        (2, [1, 3]),  # three tie at 2: the lowest index
        (3, [1, 3, 4]),
        (4, [1, 3, 4, 5]),
        (5, [1, 3, 4, 5, 9]),
        (6, [0, 1, 3, 4, 5, 9]),  # 0.5 and -0.5 tie: the sign does not count
        (8, [0, 1, 3, 4, 5, 6, 8, 9]),
        (9, [0, 1, 2, 3, 4, 5, 6, 8, 9]),  # one of the two zeros
        (10, range(10)),
    ],
)
def test_ten_elements_by_hand(dtype, k, kept):
    assert select_whole(TEN.to(dtype), k) == on(*kept)


def test_ties_go_by_global_index_not_by_order_of_the_fragments():
    ones = torch.ones(4)
    late, early = select_masks([ones, ones], [4, 0], ["late", "early"], 5)
    assert early.tolist() == [True] * 4
    assert late.tolist() == [True, False, False, False]


def test_nothing_wanted():
    assert select_whole(TEN, 0) == on()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_and_negative_zero(dtype):
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0], dtype=dtype)
    assert select_whole(zeros, 3) == on(0, 1, 2, of=5)


def test_fp32_values_that_share_their_high_bits():
    """Only the second histogram tells these apart: 1 + i * 2^-23."""
    step = torch.tensor([3, 0, 7, 7, 1, 65535, 2, 7, 0, 6])
    scores = (step + 0x3F800000).int().view(torch.float32)
    assert int((scores.view(torch.int32) >> 16).unique().numel()) == 1
    assert select_whole(scores, 3) == on(2, 3, 5)
    assert select_whole(scores, 5) == on(2, 3, 5, 7, 9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_have_an_order(dtype):
    bits = torch.tensor([3, 0, 2, 1, 3])
    scores = bits.int().view(torch.float32) if dtype == torch.float32 else bits.short().view(dtype)
    assert select_whole(scores, 1) == on(0, of=5)
    assert select_whole(scores, 3) == on(0, 2, 4, of=5)
    assert select_whole(scores, 4) == on(0, 2, 3, 4, of=5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_finite_value_is_finite(dtype):
    top = torch.finfo(dtype).max
    assert select_whole(torch.tensor([1.0, -top, 0.0], dtype=dtype), 1) == on(1, of=3)


def test_agrees_with_the_reference_of_the_whole_method():
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.randint(-3, 4, (5, 3), generator=generator).float(),
        "b": torch.randn(4, 6, generator=generator),
    }
    flat = [s.flatten() for s in scores.values()]
    for k in range(40):
        found = select_masks(flat, [0, 15], list(scores), k)
        expected = reference.top_k(scores, k, set())
        for name, mask in zip(scores, found, strict=True):
            assert torch.equal(mask.view(scores[name].shape), expected[name])


# Few values, so that most elements tie; drawn as integers, exact in every dtype.
tied = st.lists(st.integers(-3, 3), min_size=1, max_size=60)
floats = st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=60)


@examples(200)
@given(st.one_of(tied, floats), dtypes, st.data())
def test_equals_brute_force(values, dtype, data):
    """Any cut, any order of fragments, any k."""
    scores = torch.tensor(values, dtype=torch.float64).to(dtype)
    cuts = data.draw(st.lists(st.integers(0, len(scores)), max_size=4))
    order = data.draw(st.permutations(range(len(cuts) + 1)))
    k = data.draw(st.integers(0, len(scores)))
    found = select(scores, cuts, order, k)
    assert int(found.sum()) == k
    assert torch.equal(found, brute_force(scores, k))


@examples(50)
@given(st.lists(st.integers(0, 2**31 - 2**23 - 1), min_size=1, max_size=40), st.data())
def test_any_finite_bit_pattern(patterns, data):
    """Also denormals and neighbours in the last bit, where a comparison by value may flush."""
    signs = data.draw(st.lists(st.booleans(), min_size=len(patterns), max_size=len(patterns)))
    signed = [p - 2**31 if s else p for p, s in zip(patterns, signs, strict=True)]
    scores = torch.tensor(signed, dtype=torch.int32).view(torch.float32)
    k = data.draw(st.integers(1, len(patterns)))
    order = sorted(range(len(patterns)), key=lambda i: (-patterns[i], i))
    assert select_whole(scores, k) == on(*order[:k], of=len(patterns))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [15, 16, 17, 32, 100])
def test_across_chunk_borders(monkeypatch, dtype, size):
    monkeypatch.setattr(counting, "CHUNK", 16)
    generator = torch.Generator().manual_seed(size)
    scores = torch.randint(-2, 3, (size,), generator=generator).to(dtype)
    for k in range(1, size + 1):
        assert torch.equal(select(scores, [], [0], k), brute_force(scores, k))


@pytest.mark.parametrize("replicated", [False, True])
def test_one_process_is_its_own_replica(replicated):
    assert select_whole(TEN, 6, replicated=replicated) == on(0, 1, 3, 4, 5, 9)


def test_scores_are_left_alone():
    scores = TEN.clone()
    select_whole(scores, 4)
    assert torch.equal(scores, TEN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("chunk", [1 << 20, 16])
def test_non_finite_names_parameter_and_rank_alone(monkeypatch, dtype, bad, chunk):
    monkeypatch.setattr(counting, "CHUNK", chunk)
    good, poor = torch.full((40,), 0.625, dtype=dtype), torch.full((40,), 0.625, dtype=dtype)
    poor[-1] = bad
    with pytest.raises(UserError) as caught:
        select_masks([good, poor], [0, 40], ["fine.weight", "broken.weight"], 7)
    message = str(caught.value)
    assert "the gradient of broken.weight is not finite (rank 0)" in message
    assert "fine.weight" not in message
    assert not re.search(r"0\.625|nan|inf\b|79|39", message), "an error shows values or positions"


def test_more_than_there_is():
    with pytest.raises(AssertionError, match="k=11 of 10"):
        select_whole(TEN, 11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_beyond_the_packed_mask(dtype):
    """Under 5% of the scores: chunks, never a vector of their length."""
    numel = 50_000_000
    extra = extra_bytes(numel, int(0.7 * numel), dtype)
    assert extra < 0.05 * numel * (4 if dtype == "float32" else 2)
