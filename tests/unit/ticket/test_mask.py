import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmp_ds.ticket.mask import ParamMask, count_common, full_bits, iou, pack, popcount, unpack
from tests.helpers.examples import examples

# Ten elements by hand: 0, 3, 4 and 9 kept. Byte 0 is 1 + 8 + 16, byte 1 is element 9 alone.
TEN = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
TEN_BITS = torch.tensor([25, 2], dtype=torch.uint8)

bools = st.lists(st.booleans(), max_size=70).map(lambda values: torch.tensor(values).bool())


def test_ten_elements_by_hand():
    assert torch.equal(pack(TEN), TEN_BITS)
    assert torch.equal(unpack(TEN_BITS, 10), TEN)
    assert popcount(TEN_BITS) == 4


def test_pack_is_row_major():
    assert torch.equal(pack(TEN.view(2, 5)), TEN_BITS)
    assert torch.equal(pack(TEN.view(5, 2).t()), pack(TEN.view(5, 2).t().contiguous()))


@examples()
@given(bools)
def test_pack_then_unpack(mask):
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == ((len(mask) + 7) // 8,)
    assert torch.equal(unpack(bits, len(mask)), mask)
    assert popcount(bits) == sum(mask.tolist())
    by_hand = [sum(1 << i for i, on in enumerate(byte) if on) for byte in mask.split(8)]
    assert bits.tolist() == (by_hand if len(mask) else [])


@examples()
@given(bools, st.data())
def test_unpack_any_span(mask, data):
    """Spans that start and end inside bytes, as ZeRO cuts them."""
    start = data.draw(st.integers(0, len(mask)))
    numel = data.draw(st.integers(0, len(mask) - start))
    found = unpack(pack(mask), numel, start)
    assert found.dtype == torch.bool
    assert torch.equal(found, mask[start : start + numel])


def test_popcount_of_each_byte():
    for byte in range(256):
        assert popcount(torch.tensor([byte, byte], dtype=torch.uint8)) == 2 * bin(byte).count("1")


def test_popcount_does_not_overflow():
    assert popcount(torch.full((1000,), 255, dtype=torch.uint8)) == 8000


@examples()
@given(st.data())
def test_count_common_and_iou(data):
    n = data.draw(st.integers(1, 40))
    kept = data.draw(st.integers(1, n))
    a, b = (
        torch.zeros(n, dtype=torch.bool).index_fill_(
            0, torch.tensor(data.draw(st.permutations(range(n)))[:kept]), True
        )
        for _ in range(2)
    )
    common = int(count_common(pack(a), pack(b)))
    assert common == int((a & b).sum())
    assert iou(common, kept) == int((a & b).sum()) / int((a | b).sum())


def test_iou_by_hand():
    # 1110 and 0111: two of four in common.
    assert iou(2, 3) == 0.5
    assert iou(3, 3) == 1.0
    assert iou(0, 3) == 0.0


def _two_parameters() -> ParamMask:
    odd = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    return ParamMask(bits={"w": TEN_BITS, "odd": pack(odd)}, shapes={"w": (2, 5), "odd": (3, 3)})


def test_param_mask():
    mask = _two_parameters()
    assert mask.full("w").tolist() == TEN.view(2, 5).tolist()
    assert mask.full("odd").shape == (3, 3)
    assert mask.fragment("w", 3, 4).tolist() == [True, True, False, False]
    assert mask.fragment("odd", 8, 1).tolist() == [True]
    assert mask.fragment("odd", 9, 0).tolist() == []
    assert (mask.numel("w"), mask.numel("odd")) == (10, 9)
    assert (mask.num_kept, mask.num_params) == (8, 19)


def test_num_kept_before_by_hand():
    mask = _two_parameters()
    assert [mask.num_kept_before("w", i) for i in range(11)] == [0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 4]


@examples()
@given(bools, st.data())
def test_num_kept_before(mask, data):
    start = data.draw(st.integers(0, len(mask)))
    whole = ParamMask(bits={"w": pack(mask)}, shapes={"w": (len(mask),)})
    assert whole.num_kept_before("w", start) == int(mask[:start].sum())


def test_scalar_and_empty_parameters():
    mask = ParamMask(
        bits={"scalar": pack(torch.tensor(True)), "empty": pack(torch.empty(0, 3).bool())},
        shapes={"scalar": (), "empty": (0, 3)},
    )
    assert mask.num_params == 1
    assert mask.num_kept == 1
    assert mask.full("scalar").shape == ()
    assert mask.full("empty").shape == (0, 3)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 1000])
def test_full_bits(numel):
    assert torch.equal(full_bits(numel), pack(torch.ones(numel, dtype=torch.bool)))


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r}".format])
def test_nothing_of_the_content_is_printed(show):
    """Equal for every content: a mask in a log or a traceback would be a leaked mask."""
    a = ParamMask(bits={"w": TEN_BITS}, shapes={"w": (10,)})
    b = ParamMask(bits={"w": pack(~TEN)}, shapes={"w": (10,)})
    assert show(a) == show(b) == "ParamMask(10 elements)"
