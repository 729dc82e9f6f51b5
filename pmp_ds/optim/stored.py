"""The optimizer's state: made for a tensor; its moments, read and written in torch operations."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pmp_ds.config.moments import BLOCK, MomentFormat
from pmp_ds.optim.kernels.batch import Master, Segment, Tensors
from pmp_ds.optim.low_bit import (
    LOWEST_EXPONENT,
    from_codes,
    key_of,
    random_bits,
    shared_exponents,
    split,
    to_bf16,
    to_codes,
)
from pmp_ds.ticket.mask import popcount, unpack

CHUNK = 1 << 20  # elements gathered at once; a multiple of BLOCK
MASTER_STATE: dict[Master, str] = {"compact": "master", "split": "master_low"}
"""The names of fp32 master weights, and of their lower bits, in the state."""
EXPONENTS = "_exponents"
"""Follows a moment's name in the name of its blocks' exponents."""


def kept_master(
    tensor: torch.Tensor, mask: torch.Tensor | None, master: Master
) -> dict[str, torch.Tensor]:
    """Return what ``master`` keeps of a tensor's weights apart; ``mask`` is packed, None keeps
    all."""
    if master == "dense":
        return {}
    dtype, done = torch.int16 if master == "split" else torch.float32, 0
    kept = torch.empty(_num_kept(tensor, mask), dtype=dtype, device=tensor.device)
    for i, chunk in enumerate(tensor.detach().view(-1).split(CHUNK)):
        values = chunk if mask is None else chunk[unpack(mask, chunk.numel(), i * CHUNK)]
        kept[done : done + len(values)] = split(values.float()) if master == "split" else values
        done += len(values)
    return {MASTER_STATE[master]: kept}


def fresh_moments(
    tensor: torch.Tensor,
    mask: torch.Tensor | None,  # packed
    num_blocks: int,  # of its segments
    moments: Sequence[str],
    moment_format: MomentFormat,
) -> dict[str, torch.Tensor]:
    """Return moments of 0 for the kept elements of a tensor."""
    num_kept, device, state = _num_kept(tensor, mask), tensor.device, {}
    for name in moments:
        state[name] = torch.zeros(num_kept, dtype=moment_format.dtype, device=device)
        if moment_format.has_exponents:
            lowest = torch.full((num_blocks,), LOWEST_EXPONENT, dtype=torch.uint8, device=device)
            state[name + EXPONENTS] = lowest
    return state


def _num_kept(tensor: torch.Tensor, mask: torch.Tensor | None) -> int:
    return tensor.numel() if mask is None else popcount(mask)


@dataclass(frozen=True)
class Stored:
    """The moments of a run of elements of a segment that begins with one of its blocks."""

    format: MomentFormat
    signed: tuple[bool, ...]  # whether each moment may be negative
    segment: Segment
    step: int  # of the update
    tensors: Tensors
    here: slice  # of the segment
    kept: torch.Tensor | None  # (n,) their places in the run; None: all are kept
    span: slice  # of compact state

    def read(self, number: int) -> torch.Tensor:
        """Return moment ``number`` of the kept elements, (n,) fp32: the stored one itself, if it is
        stored in fp32."""
        stored = self.tensors.moments[number][self.span]
        if not self.format.has_exponents:
            return stored if stored.dtype == torch.float32 else stored.float()
        exponents = self.tensors.exponents[number][self._blocks].int()
        return from_codes(
            stored, exponents.repeat_interleave(self._counts), signed=self.signed[number]
        )

    def write(self, number: int, values: torch.Tensor) -> None:
        """Store (n,) fp32 that ``read`` returned and the rule has updated."""
        stored = self.tensors.moments[number][self.span]
        if stored.dtype == torch.float32:
            return
        places = torch.arange(self.here.start, self.here.stop, device=values.device)
        if self.kept is not None:
            places = places[self.kept]
        key = key_of(self.segment.stream, self.step)
        random = random_bits(places + self.segment.place, key)[number]
        if not self.format.has_exponents:
            stored.copy_(to_bf16(values, random))
            return
        exponents, counts = self.tensors.exponents[number][self._blocks], self._counts
        shared = shared_exponents(values, counts)
        exponents.copy_(torch.where(counts > 0, shared, exponents))
        each = shared.int().repeat_interleave(counts)
        stored.copy_(to_codes(values, each, random, signed=self.signed[number]))

    @property
    def _blocks(self) -> slice:
        return slice(self.here.start // BLOCK, -(-self.here.stop // BLOCK))

    @property
    def _counts(self) -> torch.Tensor:
        """The number of kept elements of each block, int64."""
        kept, size = self.kept, self.here.stop - self.here.start
        if kept is None:
            kept = torch.arange(size, device=self.tensors.master.device)
        return torch.bincount(kept // BLOCK, minlength=-(-size // BLOCK))
