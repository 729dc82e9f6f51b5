"""What the operators are called with: the kept elements of many tensors as one list of blocks.

A *segment* is a run of elements of one tensor that has one gradient tensor: a whole parameter, or a
fragment of a ZeRO partition. A *block* is a run of up to BLOCK elements of one segment, so that an
operator needs one launch for any number of tensors. `Layout` is made once for a mask, `Batch` for
every update: tensors may have moved since the last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from pmp_ds.config.moments import BLOCK, FP32, MomentFormat
from pmp_ds.optim.kernels import checks
from pmp_ds.optim.low_bit import key_of

Master = Literal["dense", "compact", "split"]
"""Where fp32 master weights are: of all elements; of the kept ones; or the lower bits of the kept
ones, whose upper bits are the bf16 weights (low_bit.py)."""
MASTERS: dict[Master, int] = {"dense": 0, "compact": 1, "split": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 1 << 14  # of BLOCK bits
SPLIT = torch.bfloat16
"""The dtype of the weights that a master weight can be split into."""
TYPES: dict[torch.dtype | None, int] = {
    None: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
}


class Coefficients(NamedTuple):
    """What one AdamW step needs of its hyper-parameters: double here, fp32 in the operators."""

    decay: float
    beta1: float
    grad_weight: float
    beta2: float
    grad_sq_weight: float
    minus_step_size: float
    sqrt_correction2: float
    eps: float


class Segment(NamedTuple):
    """Elements [start, start + numel) of one tensor; they are elements of one parameter too."""

    tensor: int  # its number in the caller's list
    start: int
    numel: int
    place: int = 0  # of the first element in the parameter
    stream: int = 0  # of the parameter's random bits: low_bit.stream_of

    @property
    def num_blocks(self) -> int:
        return -(-self.numel // BLOCK)


class Layout:
    """The blocks of ``segments``, on the device of the masks. Waits for it.

    ``masks``: by tensor, packed, or None where all elements are kept; compact state holds one value
    per kept element of a tensor, without a mask one per element.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        masks: Sequence[torch.Tensor | None],
        device: torch.device,
    ) -> None:
        self.segments, self.device = tuple(segments), device
        self.begin = torch.tensor([s.start for s in segments], dtype=torch.int64, device=device)
        numel = torch.tensor([s.numel for s in segments], dtype=torch.int64, device=device)
        self.end = self.begin + numel
        self.place = torch.tensor([s.place for s in segments], dtype=torch.int64, device=device)
        self._blocks = -(-numel // BLOCK)
        numbers = torch.arange(len(segments), device=device)
        segment = numbers.repeat_interleave(self._blocks)
        position = torch.arange(segment.numel(), device=device)
        position -= (self._blocks.cumsum(0) - self._blocks)[segment]  # of a block in its segment
        self.segment = segment.int()  # (num_blocks,)
        self.first = self.begin[segment] + BLOCK * position  # (num_blocks,) int64
        last = torch.minimum(self.first + BLOCK, self.end[segment])
        self.kept_before = self.first.clone()  # (num_blocks,) int64
        kept_after = last.clone()
        self.needed = dict.fromkeys((s.tensor for s in segments), 0)
        """By tensor: the length that compact state must have at least."""
        tensors = torch.tensor([s.tensor for s in segments], dtype=torch.int64, device=device)
        for tensor in self.needed:
            blocks = (tensors == tensor)[segment].nonzero().view(-1)
            mask = masks[tensor]
            if mask is not None:  # else all elements before a place are kept
                places = torch.stack([self.first[blocks], last[blocks]])
                self.kept_before[blocks], kept_after[blocks] = kept_before(mask, places)
            if blocks.numel():
                self.needed[tensor] = int(kept_after[blocks].max())
        self.kept_count = (kept_after - self.kept_before).int()  # (num_blocks,)

    def by_segment(self, sums: torch.Tensor) -> torch.Tensor:
        """Add up (num_blocks,) numbers by segment, in one fixed order, (num_segments,)."""
        return torch.segment_reduce(sums, "sum", lengths=self._blocks, unsafe=True)

    @property
    def num_blocks(self) -> int:
        return self.segment.numel()


def kept_before(mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the number of ones of a packed mask before each of ``places``, in its shape, int64."""
    checks.packed(mask, 0, mask.device)
    table = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)
    table = table.to(mask.device)
    stride = BLOCK // 8
    padded = mask.new_zeros(-(-(mask.numel() + 1) // stride), stride)
    padded.view(-1)[: mask.numel()] = mask
    # By chunks of rows: torch takes 12 bytes to look one up, and 8 to add one up.
    ones = torch.cat([table[rows.int()] for rows in padded.split(_ROWS)])
    whole = torch.cat([rows.sum(dim=1, dtype=torch.int64) for rows in ones.split(_ROWS)])
    whole = whole.cumsum(0) - whole
    numbers = torch.arange(stride, device=mask.device)

    def before(place: torch.Tensor) -> torch.Tensor:
        row, byte = place // BLOCK, place // 8 % stride
        earlier = ones[row] * (numbers < byte[:, None])
        low_bits = padded[row, byte] & (1 << (place % 8)) - 1
        return whole[row] + earlier.sum(dim=1, dtype=torch.int64) + table[low_bits.int()]

    return torch.cat([before(part) for part in places.view(-1).split(_ROWS)]).view(places.shape)


@dataclass(frozen=True)
class Tensors:
    """What one update has of a segment."""

    gradient: torch.Tensor | None  # (numel,) fp32, bf16 or fp16; None: nothing is updated
    weights: torch.Tensor | None  # (numel,) what the model computes with, unless that is `master`
    master: torch.Tensor  # fp32, (numel,) or compact as the moments are; split: int16, compact
    moments: tuple[torch.Tensor, ...]  # (number of kept elements,) of the whole tensor
    exponents: tuple[torch.Tensor, ...]  # of 8-bit moments: (num_blocks,) uint8 of the segment
    mask: torch.Tensor | None  # packed, of the whole tensor
    state: dict[str, Any]  # of the whole tensor, with `step`
    group: dict[str, Any]  # its hyper-parameters


class Batch:
    """One launch: the addresses of every segment's tensors, which it keeps alive.

    Raises ValueError for a tensor whose type, length, device or memory layout the operators would
    misread. Does not wait for the device.
    """

    def __init__(
        self,
        layout: Layout,
        tensors: Sequence[Tensors],
        *,
        master: Master = "dense",
        moments: MomentFormat = FP32,
    ) -> None:
        self.layout, self.tensors = layout, tuple(tensors)
        self.master, self.moments = master, moments
        for segment, each in zip(layout.segments, tensors, strict=True):
            self._check(segment, each)
        self.gradient_dtype = _common("the gradient", [t.gradient for t in tensors])
        self.weight_dtype = _common("the weights", [t.weights for t in tensors])
        columns = [
            (t.gradient, t.weights, t.master, *t.moments, t.mask, *(t.exponents or (None, None)))
            for t in tensors
        ]
        table = [[0 if one is None else one.data_ptr() for one in column] for column in columns]
        self.addresses = self._to_device(torch.tensor(table, dtype=torch.int64).view(-1, 8).t())
        """(8, num_segments) int64: a row for each kind of tensor, 0 for none."""

    def on_device(self, rows: Sequence[Coefficients]) -> torch.Tensor:
        """Return the coefficients of each segment, fp32, and the two keys of its random bits as
        they are, (num_segments, 10) fp32."""
        numbers = torch.tensor(rows, dtype=torch.float64).float()
        keys = [(0, 0)] * len(rows)
        if self.moments is not FP32:
            steps = [int(t.state["step"]) for t in self.tensors]
            streams = [s.stream for s in self.layout.segments]
            keys = [key_of(stream, step) for stream, step in zip(streams, steps, strict=True)]
        bits = torch.tensor(keys, dtype=torch.int64).view(-1, 2).int().view(torch.float32)
        return self._to_device(torch.cat([numbers, bits], dim=1))

    def factor(self, factor: torch.Tensor | None) -> torch.Tensor:
        """Return what gradients are multiplied by, () fp32; 1 for None."""
        if factor is None:
            return torch.ones((), device=self.layout.device)
        checks.require("the factor", factor, (torch.float32,), 1, self.layout.device)
        return factor

    def _check(self, segment: Segment, each: Tensors) -> None:
        device, numel = self.layout.device, segment.numel
        if each.gradient is not None:
            checks.require("the gradient", each.gradient, DTYPES, numel, device)
        if each.weights is not None:
            checks.require("the weights", each.weights, DTYPES, numel, device)
        if each.mask is not None:
            checks.packed(each.mask, numel, device, segment.start)
        compact = {f"moment {i}": moment for i, moment in enumerate(each.moments)}
        dtypes = dict.fromkeys(compact, self.moments.dtype)
        if self.master == "dense":
            checks.require("the master", each.master, (torch.float32,), numel, device)
        else:
            compact["the master"] = each.master
            dtypes["the master"] = torch.float32 if self.master == "compact" else torch.int16
        length, needed = each.moments[0].numel(), self.layout.needed[segment.tensor]
        for name, tensor in compact.items():
            checks.require(name, tensor, (dtypes[name],), length, device)
            if length < needed:
                raise ValueError(f"{name}: {length} elements, needed {needed}")
        for i, exponents in enumerate(each.exponents):
            checks.require(f"exponents {i}", exponents, (torch.uint8,), segment.num_blocks, device)
        if len(each.exponents) != len(each.moments) * self.moments.has_exponents:
            raise ValueError(f"{len(each.exponents)} tensors of exponents")
        if self.master == "split" and (each.weights is None or each.weights.dtype != SPLIT):
            raise ValueError("a split master needs bf16 weights")

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        host = host.contiguous()
        if self.layout.device.type == "cpu":
            return host
        return host.pin_memory().to(self.layout.device, non_blocking=True)


def _common(name: str, tensors: Sequence[torch.Tensor | None]) -> torch.dtype | None:
    found = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(found) > 1:
        raise ValueError(f"{name}: several dtypes in one batch: {', '.join(map(str, found))}")
    return next(iter(found), None)
