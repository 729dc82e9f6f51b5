"""Tensors for one masked update: segments that begin anywhere, neighbours that must not change, and
what a plain loop makes of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from pmp_ds.config.moments import BLOCK, MOMENTS
from pmp_ds.optim.kernels.batch import Batch, Layout, Master, Segment, Tensors
from pmp_ds.optim.low_bit import (
    LOWEST_EXPONENT,
    from_codes,
    join,
    key_of,
    random_bits,
    shared_exponents,
    split,
    to_bf16,
    to_codes,
)
from pmp_ds.optim.masked_adamw import MaskedAdamW, adamw_ref, coefficients
from pmp_ds.optim.update import Update
from pmp_ds.ticket.mask import pack, unpack

MARGIN = 3  # elements around a tensor, so that tensors are aligned to one element only


class Kind(NamedTuple):
    """Dtypes of a batch, and where master weights and moments are kept."""

    gradients: torch.dtype
    weights: torch.dtype | None  # None: the master weights are all there is
    master: Master = "dense"
    moments: str = "fp32"


_32, _16, _HALF = torch.float32, torch.bfloat16, torch.float16
KINDS = {
    "fp32": Kind(_32, None),
    "fp32, weights apart": Kind(_32, _32),
    "bf16": Kind(_16, _16),
    "fp16": Kind(_HALF, _HALF),
    "fp32 gradients, bf16 weights": Kind(_32, _16),
    "bf16, compact": Kind(_16, _16, "compact"),
    "fp16, compact": Kind(_HALF, _HALF, "compact"),
    "fp32 gradients, bf16 weights, compact": Kind(_32, _16, "compact"),
    "bf16, split": Kind(_16, _16, "split"),
    "fp32 gradients, bf16 weights, split": Kind(_32, _16, "split"),
    "fp32, bf16 moments": Kind(_32, None, "dense", "bf16"),
    "fp32, int8 moments": Kind(_32, None, "dense", "int8"),
    "fp16, bf16 moments": Kind(_HALF, _HALF, "dense", "bf16"),
    "bf16, int8 moments": Kind(_16, _16, "dense", "int8"),
    "bf16, compact, int8 moments": Kind(_16, _16, "compact", "int8"),
    "bf16, split, bf16 moments": Kind(_16, _16, "split", "bf16"),
}
SIZES = (5000, 2100, 1500, 1024, 1, 40)
SEGMENTS = (
    *(
        Segment(0, start, numel, 2 * start, 11)
        for start, numel in ((3, 1021), (1024, 9), (1040, 0), (1049, 3951))
    ),
    Segment(1, 7, 2090, 2**32 - 1000, 2**63 + 5),
    Segment(2, 0, 1500),  # without a gradient
    Segment(3, 0, 1024),  # nothing is kept
    Segment(4, 0, 1),
    Segment(5, 8, 29),
)
UNMASKED, WITHOUT_GRADIENT, EMPTY = 1, 2, 3


@dataclass
class Work:
    """What an update reads and writes."""

    kind: Kind
    masks: list[torch.Tensor | None]  # of each of SIZES
    tensors: list[Tensors] = field(default_factory=list)  # of each of SEGMENTS
    memory: list[torch.Tensor] = field(default_factory=list)
    """All that the tensors are parts of, with the elements around them."""

    @property
    def device(self) -> torch.device:
        return self.memory[0].device

    def layout(self) -> Layout:
        return Layout(SEGMENTS, self.masks, self.device)

    def batch(self) -> Batch:
        moments = MOMENTS[self.kind.moments]
        return Batch(self.layout(), self.tensors, master=self.kind.master, moments=moments)

    def update(self, operators: Any) -> Update:
        """By ``operators``, or in torch operations."""
        optimizer = MaskedAdamW(
            [torch.zeros(1)],
            master=self.kind.master,
            moment_format=MOMENTS[self.kind.moments],
        )
        kernels = None if operators is None else (operators, self.layout())
        return Update(optimizer, SEGMENTS, self.tensors, kernels)

    def set_gradients(self, seed: int, scale: float = 1.0) -> None:
        """Draw over several magnitudes; the complement's are NaN."""
        generator = torch.Generator().manual_seed(seed)
        for s, each in zip(SEGMENTS, self.tensors, strict=True):
            if each.gradient is not None:
                numbers = torch.randn(s.numel, generator=generator)
                numbers *= scale * 10 ** (2 * torch.randn(s.numel, generator=generator))
                numbers[~kept(each.mask, s).cpu()] = torch.nan
                each.gradient.copy_(numbers)


def work(
    kind: str, device: torch.device | str = "cpu", seed: int = 0, density: float = 0.7
) -> Work:
    gradient_dtype, weight_dtype, master, _ = KINDS[kind]
    moments = MOMENTS[KINDS[kind].moments]
    generator = torch.Generator().manual_seed(seed)
    dense = [torch.rand(size, generator=generator) < density for size in SIZES]
    dense[EMPTY].zero_()
    masks = [None if i == UNMASKED else pack(m).to(device) for i, m in enumerate(dense)]
    found = Work(KINDS[kind], masks)

    def within(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        found.memory.append(
            torch.cat([torch.full((MARGIN,), 7.0), values, torch.full((MARGIN,), 7.0)])
            .to(dtype)
            .to(device)
        )
        return found.memory[-1][MARGIN:-MARGIN]

    states = []
    for i, size in enumerate(SIZES):
        values = torch.randn(size, generator=generator)
        if weight_dtype is not None:
            values = values.to(weight_dtype).float()
        num_kept = size if i == UNMASKED else int(dense[i].sum())
        states.append(
            {
                "step": torch.zeros(()),
                "exp_avg": within(torch.zeros(num_kept), moments.dtype),
                "exp_avg_sq": within(torch.zeros(num_kept), moments.dtype),
                "weights": within(values, weight_dtype or torch.float32),
                "master": within(
                    values if master == "dense" or i == UNMASKED else values[dense[i]],
                    torch.int16 if master == "split" else torch.float32,
                ),
            }
        )
        if master == "split":
            states[-1]["master"].zero_()
    for s in SEGMENTS:
        state, part = states[s.tensor], slice(s.start, s.start + s.numel)
        gradient = None
        if s.tensor != WITHOUT_GRADIENT:
            gradient = within(torch.zeros(s.numel), gradient_dtype)
        exponents: tuple[torch.Tensor, ...] = ()
        if moments.has_exponents:
            lowest = torch.full((-(-s.numel // BLOCK),), float(LOWEST_EXPONENT))
            exponents = (within(lowest, torch.uint8), within(lowest, torch.uint8))
        found.tensors.append(
            Tensors(
                gradient=gradient,
                weights=None if weight_dtype is None else state["weights"][part],
                master=state["master"][part] if master == "dense" else state["master"],
                moments=(state["exp_avg"], state["exp_avg_sq"]),
                exponents=exponents,
                mask=masks[s.tensor],
                state=state,
                group={
                    "lr": 0.01,
                    "betas": (0.9, 0.95),
                    "eps": 1e-8,
                    "weight_decay": 0.1 * s.tensor,
                },
            )
        )
    return found


def kept(mask: torch.Tensor | None, s: Segment) -> torch.Tensor:
    """(numel,) bool"""
    if mask is None:
        return torch.ones(s.numel, dtype=torch.bool)
    return unpack(mask, s.numel, s.start)


@torch.no_grad()
def make_ref(of: Work, factor: torch.Tensor | None) -> None:
    """What ``Update.make`` does, each segment gathered and scattered at once."""
    counted: set[int] = set()
    for s, each in zip(SEGMENTS, of.tensors, strict=True):
        if each.gradient is None:
            continue
        if s.tensor not in counted:
            counted.add(s.tensor)
            each.state["step"] = each.state["step"] + 1
        places = kept(each.mask, s)
        first = s.start if each.mask is None else int(unpack(each.mask, s.start).sum())
        compact = slice(first, first + int(places.sum()))
        gradient = each.gradient[places].float()
        if factor is not None:
            gradient = gradient * factor
        step = float(each.state["step"])
        stored = each.master[compact if of.kind.master != "dense" else places]
        if of.kind.master == "split":
            assert each.weights is not None
            stored = join(each.weights[places], stored)
        values = stored.clone()
        numbers = torch.arange(s.numel, device=of.device)[places] + s.place
        random = random_bits(numbers, key_of(s.stream, int(step)))
        m, v = (_read(of, each, i, compact, places) for i in range(2))
        adamw_ref(values, gradient, m, v, coefficients(each.group, step))
        for i, moment in enumerate((m, v)):
            _store(of, each, i, compact, places, moment, random[i])
        if of.kind.master == "split":
            each.master[compact] = split(values)
        else:
            each.master[compact if of.kind.master == "compact" else places] = values
        if each.weights is not None:
            each.weights[places] = values.to(each.weights.dtype)


def _read(of: Work, each: Tensors, i: int, compact: slice, places: torch.Tensor) -> torch.Tensor:
    stored = each.moments[i][compact]
    if of.kind.moments != "int8":
        return stored.float()
    exponents = each.exponents[i].int().repeat_interleave(_counts(places))
    return from_codes(stored, exponents, signed=i == 0)


def _store(
    of: Work,
    each: Tensors,
    i: int,
    compact: slice,
    places: torch.Tensor,
    values: torch.Tensor,
    random: torch.Tensor,
) -> None:
    if of.kind.moments == "fp32":
        each.moments[i][compact] = values
    elif of.kind.moments == "bf16":
        each.moments[i][compact] = to_bf16(values, random)
    else:
        counts = _counts(places)
        shared = shared_exponents(values, counts)
        each.exponents[i][counts > 0] = shared[counts > 0]
        codes = to_codes(values, shared.repeat_interleave(counts), random, signed=i == 0)
        each.moments[i][compact] = codes


def _counts(places: torch.Tensor) -> torch.Tensor:
    """Kept elements by block."""
    counts = [int(block.sum()) for block in places.split(BLOCK) if block.numel()]
    return torch.tensor(counts, dtype=torch.int64, device=places.device)


def squares_ref(of: Work) -> list[float]:
    """What ``Update.squares`` returns, summed up without rounding."""
    return [
        0.0
        if each.gradient is None
        else math.fsum(float(g) ** 2 for g in each.gradient[kept(each.mask, s)].double())
        for s, each in zip(SEGMENTS, of.tensors, strict=True)
    ]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of each number, so that NaN equals NaN and 0 is not -0."""
    return tensor.detach().view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.itemsize])


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(raw(x.cpu()), raw(y.cpu())) for x, y in zip(a, b, strict=True))
