"""Tensors for one masked update: segments that begin anywhere, neighbours that must not change, and
what a plain loop makes of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pmp_ds.optim.kernels.batch import Batch, Layout, Segment, Tensors
from pmp_ds.optim.masked_adamw import MaskedAdamW, adamw_ref, coefficients
from pmp_ds.optim.update import Update
from pmp_ds.ticket.mask import pack, unpack

MARGIN = 3  # elements around a tensor, so that tensors are aligned to one element only
KINDS: dict[str, tuple[torch.dtype, torch.dtype | None, bool]] = {
    "fp32": (torch.float32, None, False),
    "fp32, weights apart": (torch.float32, torch.float32, False),
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "fp16": (torch.float16, torch.float16, False),
    "fp32 gradients, bf16 weights": (torch.float32, torch.bfloat16, False),
    "bf16, compact": (torch.bfloat16, torch.bfloat16, True),
    "fp16, compact": (torch.float16, torch.float16, True),
    "fp32 gradients, bf16 weights, compact": (torch.float32, torch.bfloat16, True),
}
"""Gradients, weights apart from the master, and whether the master is compact."""
SIZES = (5000, 2100, 1500, 1024, 1, 40)
SEGMENTS = (
    *(Segment(0, start, numel) for start, numel in ((3, 1021), (1024, 9), (1040, 0), (1049, 3951))),
    Segment(1, 7, 2090),
    Segment(2, 0, 1500),  # without a gradient
    Segment(3, 0, 1024),  # nothing is kept
    Segment(4, 0, 1),
    Segment(5, 8, 29),
)
UNMASKED, WITHOUT_GRADIENT, EMPTY = 1, 2, 3


@dataclass
class Work:
    """What an update reads and writes."""

    compact_master: bool
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
        return Batch(self.layout(), self.tensors, compact_master=self.compact_master)

    def update(self, operators: Any) -> Update:
        """By ``operators``, or in torch operations."""
        optimizer = MaskedAdamW([torch.zeros(1)], compact_master=self.compact_master)
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
    gradient_dtype, weight_dtype, compact_master = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    dense = [torch.rand(size, generator=generator) < density for size in SIZES]
    dense[EMPTY].zero_()
    masks = [None if i == UNMASKED else pack(m).to(device) for i, m in enumerate(dense)]
    found = Work(compact_master, masks)

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
                "exp_avg": within(torch.zeros(num_kept), torch.float32),
                "exp_avg_sq": within(torch.zeros(num_kept), torch.float32),
                "weights": within(values, weight_dtype or torch.float32),
                "master": within(
                    (values if i == UNMASKED else values[dense[i]]) if compact_master else values,
                    torch.float32,
                ),
            }
        )
    for s in SEGMENTS:
        state, part = states[s.tensor], slice(s.start, s.start + s.numel)
        gradient = None
        if s.tensor != WITHOUT_GRADIENT:
            gradient = within(torch.zeros(s.numel), gradient_dtype)
        found.tensors.append(
            Tensors(
                gradient=gradient,
                weights=None if weight_dtype is None else state["weights"][part],
                master=state["master"] if compact_master else state["master"][part],
                moments=(state["exp_avg"], state["exp_avg_sq"]),
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
        values = each.master[compact if of.compact_master else places].clone()
        m, v = (moment[compact] for moment in each.moments)
        adamw_ref(values, gradient, m, v, coefficients(each.group, float(each.state["step"])))
        each.master[compact if of.compact_master else places] = values
        if each.weights is not None:
            each.weights[places] = values.to(each.weights.dtype)


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
    return tensor.detach().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(raw(x.cpu()), raw(y.cpu())) for x, y in zip(a, b, strict=True))
