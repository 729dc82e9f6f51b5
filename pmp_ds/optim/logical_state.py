"""Store optimizer state by position in the model instead of by rank and stage.

A parameter's kept elements are numbered in row-major order. A fragment's share of `exp_avg`,
`exp_avg_sq` and, in 16-bit training, of the fp32 `master` weights is a run of these numbers, so
state written under one sharding can be read under another. Of a split master the lower bits are
written, `master_low`; of 8-bit moments the values in bf16, which holds them exactly and depends on
no block.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from pmp_ds.config.moments import BLOCK, MomentFormat
from pmp_ds.optim.kernels.batch import Master
from pmp_ds.optim.low_bit import NEAREST, from_codes, join, shared_exponents, split, to_codes
from pmp_ds.optim.stored import EXPONENTS, MASTER_STATE
from pmp_ds.optim.zero import Fragment, ZeroShards
from pmp_ds.ticket.mask import ParamMask

MASTER, MASTER_LOW = MASTER_STATE["compact"], MASTER_STATE["split"]

Collected = Callable[[], dict[str, torch.Tensor]]
# (kind, parameter, first kept element, count) -> (count,) fp32, of `master_low` int16
Read = Callable[[str, str, int, int], torch.Tensor]


def _spans(shards: ZeroShards, mask: ParamMask | None) -> Iterator[tuple[Fragment, int, slice]]:
    """Yield each fragment, the number of its first kept element within the parameter, and its span
    in the flat's compact tensors."""
    done = [0] * len(shards.flats)
    for f in shards.fragments:
        if mask is None:  # compact tensors are then as long as the flat, padding included
            yield f, f.start, slice(f.flat_start, f.flat_start + f.numel)
        else:
            first = mask.num_kept_before(f.name, f.start)
            count = mask.num_kept_before(f.name, f.start + f.numel) - first
            done[f.flat] += count
            yield f, first, slice(done[f.flat] - count, done[f.flat])


def _kept(f: Fragment, mask: ParamMask | None) -> torch.Tensor:
    """Return the mask of a fragment, (numel,) bool on CPU."""
    if mask is None:
        return torch.ones(f.numel, dtype=torch.bool)
    return mask.fragment(f.name, f.start, f.numel)


def _kept_by_block(f: Fragment, mask: ParamMask | None) -> torch.Tensor:
    """Return the number of kept elements of each block of a fragment, int64."""
    kept = torch.zeros(f.segment.num_blocks * BLOCK, dtype=torch.bool)
    kept[: f.numel] = _kept(f, mask)
    return kept.view(-1, BLOCK).sum(dim=1)


def _blocks(shards: ZeroShards) -> Iterator[slice]:
    """Yield the blocks of each fragment among those of its flat."""
    done = [0] * len(shards.flats)
    for f in shards.fragments:
        first = done[f.flat]
        done[f.flat] += f.segment.num_blocks
        yield slice(first, done[f.flat])


class Stateful(Protocol):
    """An optimizer whose moments have one value per kept element of each tensor."""

    master: Master
    moment_format: MomentFormat

    @property
    def moments(self) -> tuple[str, ...]: ...

    @property
    def signed(self) -> tuple[bool, ...]: ...

    @property
    def state(self) -> Any: ...


def collect(
    optimizer: Stateful, shards: ZeroShards, mask: ParamMask | None, *, master: bool
) -> Collected:
    """Copy this rank's state to CPU memory and return a function that converts the copy.

    The function may run in any thread and returns `KIND/PARAMETER/FIRST` -> (count,) tensors.
    """
    apart = MASTER_STATE.get(optimizer.master)
    in_codes, signed = (
        optimizer.moment_format.has_exponents,
        dict(zip(optimizer.moments, optimizer.signed, strict=True)),
    )
    kinds = [*optimizer.moments, *([apart] if apart else [])]
    if in_codes:
        kinds += [name + EXPONENTS for name in optimizer.moments]
    copies = [{kind: _copy(optimizer.state[flat][kind]) for kind in kinds} for flat in shards.flats]
    dense = [_copy(flat) if master and not apart else None for flat in shards.flats]

    def in_logical_form() -> dict[str, torch.Tensor]:
        tensors = {}
        for (f, first, span), blocks in zip(_spans(shards, mask), _blocks(shards), strict=True):
            state = copies[f.flat]
            counts = _kept_by_block(f, mask) if in_codes else None
            for kind in (*optimizer.moments, *([apart] if apart else [])):
                values = state[kind][span]
                if counts is not None and kind in signed:
                    exponents = state[kind + EXPONENTS][blocks].repeat_interleave(counts)
                    values = from_codes(values, exponents, signed=signed[kind]).bfloat16()
                tensors[f"{kind}/{f.name}/{first}"] = values
            if (master_of := dense[f.flat]) is not None:
                whole = master_of[f.flat_start : f.flat_start + f.numel]
                tensors[f"{MASTER}/{f.name}/{first}"] = whole[_kept(f, mask)]
        return tensors

    return in_logical_form


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).to("cpu", copy=True)


@torch.no_grad()
def restore(
    optimizer: Stateful,
    shards: ZeroShards,
    mask: ParamMask | None,
    kinds: Iterable[str],
    read: Read,
    *,
    master: bool,
) -> None:
    """Fill this rank's share of an armed optimizer through ``read``, which knows ``kinds``; the
    caller sets the number of updates."""
    low = MASTER_LOW in set(kinds)
    for (f, first, span), blocks in zip(_spans(shards, mask), _blocks(shards), strict=True):
        flat, count = shards.flats[f.flat], span.stop - span.start
        state = optimizer.state[flat]
        counts = _kept_by_block(f, mask) if optimizer.moment_format.has_exponents else None
        for kind, signed in zip(optimizer.moments, optimizer.signed, strict=True):
            values = read(kind, f.name, first, count)
            if counts is not None:
                exponents = shared_exponents(values, counts)
                each = exponents.repeat_interleave(counts)
                values = to_codes(values, each, NEAREST, signed=signed)
                state[kind + EXPONENTS][blocks] = exponents.to(flat.device)
            state[kind].view(-1)[span] = values.to(flat.device, state[kind].dtype)
        if not master:
            continue
        whole, kept = f.of(flat), _kept(f, mask).to(flat.device)
        values = read(MASTER_LOW if low else MASTER, f.name, first, count).to(flat.device)
        if optimizer.master == "split":
            state[MASTER_LOW].view(-1)[span] = values if low else split(values)
            continue
        if low:  # the flat holds the weights, in their own dtype or in fp32
            values = join(whole[kept].bfloat16(), values)
        if optimizer.master == "compact":
            state[MASTER].view(-1)[span] = values
        else:
            whole[kept] = values
