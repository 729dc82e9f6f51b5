"""What every ZeRO stage tells about this rank's share of the model.

A *flat* is a tensor that the client optimizer steps: a whole parameter or its fp32 clone at stage
0, the rank's partition of a parameter group at stages 1 and 2, of a sub-group at stage 3. A
*fragment* is a run of elements of one parameter inside one flat; a flat may also hold padding,
which belongs to no fragment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pmp_ds import dist
from pmp_ds.optim.kernels.batch import Segment
from pmp_ds.optim.low_bit import stream_of
from pmp_ds.optim.stored import CHUNK
from pmp_ds.ticket.mask import ParamMask, pack


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a parameter, at [flat_start, flat_start + numel) of a
    flat; indices are row-major."""

    name: str
    start: int
    numel: int
    flat: int  # index into ZeroShards.flats
    flat_start: int

    @property
    def segment(self) -> Segment:
        return Segment(self.flat, self.flat_start, self.numel, self.start, stream_of(self.name))

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return its part of a 1-D tensor as long as its flat, a view."""
        return flat.view(-1)[self.flat_start : self.flat_start + self.numel]


class ZeroShards(Protocol):
    """This rank's share of the model, and what DeepSpeed's ``step`` does besides the update."""

    flats: list[torch.Tensor]
    """What the client optimizer steps: fp32, or with a compact or split master 16-bit."""
    fragments: list[Fragment]
    """In flat order."""
    groups: list[int]
    """The parameter group of each flat."""
    replicated: bool
    """Whether every rank holds everything (stage 0)."""
    device: torch.device
    """Where the reduced gradients are: the CPU under offload. The same kind on every rank."""
    clip_norm: float
    """0 for no clipping."""
    scales_loss: bool
    """Whether training is in fp16, where gradients may overflow."""

    @property
    def loss_scale(self) -> float:
        """What the reduced gradients are multiplied by."""
        ...

    def gradients(self) -> list[torch.Tensor]:
        """Return the reduced gradient of each fragment times the loss scale, (numel,) each: views,
        valid between ``engine.backward`` at an accumulation boundary and ``engine.step``."""
        ...

    def weights(self) -> list[torch.Tensor] | None:
        """Return what receives the updated weights of each fragment, (numel,) in the training
        dtype; None where the flats do, or DeepSpeed copies them."""
        ...

    def norm(self, squares: torch.Tensor) -> torch.Tensor:
        """Return the norm over all ranks of the gradients whose sums of squares by fragment these
        are, (num_fragments,) fp64: (), on the device of the flats, not finite if one is not.
        Collective."""
        ...

    def drop_fp32_master(self) -> None:
        """Replace the fp32 flats by the 16-bit weights themselves, once."""
        ...

    def replace_step(self, step: Any) -> None:
        """Make DeepSpeed call ``step`` to update the weights."""
        ...

    def free(self) -> None:
        """Free what DeepSpeed keeps when its engine is destroyed; then nothing of the engine or
        its model can be used."""
        ...

    def before_step(self) -> None:
        """Do what DeepSpeed does first in ``step``."""
        ...

    def count(self, overflow: bool, norm: torch.Tensor) -> None:
        """Tell DeepSpeed how it went: its loss scale adapts, and it reports the norm."""
        ...

    def after_step(self) -> None:
        """Free the gradients and give all ranks the updated weights. Collective."""
        ...

    def discard(self) -> None:
        """Free the gradients; nothing was updated."""
        ...


def gradient_of(param: torch.Tensor) -> torch.Tensor:
    """Return its gradient; zeros for a parameter that the loss does not use."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad


def forget(zero: Any, params: Sequence[torch.Tensor]) -> None:
    """Free the tensors of one of DeepSpeed's optimizers and of its parameters. DeepSpeed 0.19.8
    leaves them in reference cycles, at stage 3 through hooks in autograd's graph, which Python
    cannot collect."""
    for held in (*params, zero):
        vars(held).clear()
    for param in params:
        param.data, param.grad = param.new_empty(0), None


def pieces(gradients: Any) -> list[torch.Tensor]:
    """Return a flat's gradient as 1-D tensors in flat order."""
    flat = getattr(gradients, "flat_partition", None)
    return [flat.view(-1)] if flat is not None else [g.view(-1) for g in gradients]


def slice_of(found: list[torch.Tensor], start: int, numel: int) -> torch.Tensor:
    """Return elements [start, start + numel) of a concatenation, which lie in one piece: a view."""
    for piece in found:
        if start < piece.numel():
            assert start + numel <= piece.numel(), "a fragment spans two gradient tensors"
            return piece[start : start + numel]
        start -= piece.numel()
    raise AssertionError("a fragment lies outside the gradient partition")


def norm_over_ranks(
    squares: torch.Tensor,
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    replicated: bool = False,
) -> torch.Tensor:
    """Combine sums of squares by fragment to the norm over all ranks, with DeepSpeed's arithmetic.

    ``sizes``: how many consecutive fragments DeepSpeed takes a norm of. ``dtype``: of the sum over
    the ranks and all after it. ``replicated``: every rank has all gradients. Collective.
    """
    sums = torch.stack([part.sum() for part in squares.split(list(sizes))]).to(dtype)
    sums = sums if replicated else dist.all_reduce_sum(sums)
    return torch.linalg.vector_norm(sums.sqrt())


def flat_masks(
    shards: ZeroShards, mask: ParamMask | None
) -> dict[torch.Tensor, torch.Tensor | None]:
    """Return the packed mask of each flat for ``MaskedOptimizer.arm``; padding is 0. None keeps
    everything."""
    if mask is None:
        return dict.fromkeys(shards.flats)
    fragments: list[list[Fragment]] = [[] for _ in shards.flats]
    for f in shards.fragments:
        fragments[f.flat].append(f)
    return {
        flat: _packed(mask, flat.numel(), inside).to(flat.device)
        for flat, inside in zip(shards.flats, fragments, strict=True)
    }


def _packed(mask: ParamMask, numel: int, fragments: Sequence[Fragment]) -> torch.Tensor:
    """Return the packed bits of a flat. A chunk of them is unpacked at a time: fragments begin at
    any bit."""
    chunks = [torch.empty(0, dtype=torch.uint8)]
    for first in range(0, numel, CHUNK):
        kept = torch.zeros(min(CHUNK, numel - first), dtype=torch.bool)
        for f in fragments:
            low = max(first, f.flat_start)
            count = min(first + len(kept), f.flat_start + f.numel) - low
            if count > 0:
                part = mask.fragment(f.name, f.start + low - f.flat_start, count)
                kept[low - first : low - first + count] = part
        chunks.append(pack(kept))
    return torch.cat(chunks)
